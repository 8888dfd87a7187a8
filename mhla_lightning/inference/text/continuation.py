"""Continue texts piece by piece, up to a stop string."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from mhla_lightning.data.tokenizers import TextStream, Tokenizer
from mhla_lightning.errors import UserError
from mhla_lightning.inference.text.engine import CausalBackbone, Finish, generate
from mhla_lightning.inference.text.sampling import Sampling
from mhla_lightning.inference.text.token_graph import Execution


class StopText:
    """The text of new tokens up to the first stop string.

    A stop string may begin in one token and end in another.

    Args:
        tokenizer: decodes the tokens.
        stops: the stop strings. The first one to end stops the text; of several, the longest.

    Attributes:
        stopped: whether a stop string has been found.

    Raises:
        UserError: an empty stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        if not all(stops):
            raise UserError(
                "stops", "one is empty and would stop before the first token; give only strings with text"
            )
        self.stops, self.stopped = tuple(stops), False
        self._stream, self._held = TextStream(tokenizer), ""

    def push(self, token: int) -> str:
        """Add a token and return the text that is now certain.

        Text that may still become a stop string is held back.
        """
        return self._take(self._stream.push(token))

    def finish(self) -> str:
        """Return the text that was held back, after the last token."""
        if self.stopped:
            return ""
        text = self._take(self._stream.finish())
        return text if self.stopped else text + self._held

    def _take(self, text: str) -> str:
        """Add text one character at a time, so that token boundaries do not change the result."""
        certain = ""
        for character in text:
            self._held += character
            ended = [stop for stop in self.stops if self._held.endswith(stop)]
            if ended:
                self.stopped = True
                return certain + self._held[: -max(map(len, ended))]
            cut = len(self._held) - self._may_become()
            certain, self._held = certain + self._held[:cut], self._held[cut:]
        return certain

    def _may_become(self) -> int:
        """Return the length of the longest end of the held text that begins a stop string."""
        longest = max((len(stop) for stop in self.stops), default=1) - 1
        lengths = range(min(longest, len(self._held)), 0, -1)
        return next((n for n in lengths if any(stop.startswith(self._held[-n:]) for stop in self.stops)), 0)


@dataclass(frozen=True)
class Continuation:
    """The text that one step added to one prompt.

    Attributes:
        prompt: index of the prompt.
        token: the new token.
        text: the new text; may be empty.
        finished: why the continuation ends here; None while it continues.
        state_bytes: bytes of the state of the whole batch.
    """

    prompt: int
    token: int
    text: str
    finished: Finish | None
    state_bytes: int


def continue_prompts(
    backbone: CausalBackbone,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    max_new_tokens: int,
    *,
    stops: Sequence[str] = (),
    padding: Literal["left", "right"] = "left",
    batch_size: int | None = None,
    device: torch.device | str | Execution = "cpu",
) -> Iterator[Continuation]:
    """Continue every prompt as text, without the stop string and what follows it.

    Args:
        backbone: see :func:`generate`; so are all arguments that are not listed here.
        tokenizer: decodes the new tokens.
        prompts: token ids of each prompt (`tokenizer.encode`).
        stops: strings that end a continuation.

    Raises:
        UserError: see :func:`generate`; an empty stop string.
    """
    outputs = [StopText(tokenizer, stops) for _ in prompts]
    shown = [""] * len(prompts)

    def stop(prompt: int, token: int) -> bool:
        shown[prompt] = outputs[prompt].push(token)
        return outputs[prompt].stopped

    steps = generate(
        backbone,
        prompts,
        sampling,
        max_new_tokens,
        end=tokenizer.end,
        stop=stop,
        padding=padding,
        batch_size=batch_size,
        vocabulary=tokenizer.vocabulary,
        device=device,
    )
    for step in steps:
        for prompt, token in zip(step.prompts, step.tokens, strict=True):
            finished = step.finished.get(prompt)
            text, shown[prompt] = shown[prompt], ""
            yield Continuation(
                prompt,
                token,
                text + (outputs[prompt].finish() if finished else ""),
                finished,
                step.state_bytes,
            )
