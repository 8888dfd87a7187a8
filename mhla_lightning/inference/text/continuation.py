"""Texts in, continuations out as they are made, up to a stop string."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from mhla_lightning.data.tokenizers import TextStream, Tokenizer
from mhla_lightning.errors import UserError
from mhla_lightning.inference.text.engine import CausalBackbone, Finish, generate
from mhla_lightning.inference.text.sampling import Sampling


class StopText:
    """Text of new tokens up to the first stop string, which may begin in one token and end in another.

    Args:
        tokenizer: what the tokens are of.
        stops: the strings; the one that ends first stops, and of those the one that begins first.

    Attributes:
        stopped: whether a stop string has come.

    Raises:
        UserError: an empty stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        if not all(stops):
            raise UserError("a stop string is empty; it would stop before the first token")
        self.stops, self.stopped = tuple(stops), False
        self._stream, self._held = TextStream(tokenizer), ""

    def push(self, token: int) -> str:
        """The text that this token makes certain: what may still become a stop string is held back."""
        return self._take(self._stream.push(token))

    def finish(self) -> str:
        """What was held back, when no more tokens come."""
        if self.stopped:
            return ""
        text = self._take(self._stream.finish())
        return text if self.stopped else text + self._held

    def _take(self, text: str) -> str:
        """Character by character, so that the result does not depend on how tokens cut the text."""
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
        """Length of the longest end of the held text that a stop string begins with."""
        longest = max((len(stop) for stop in self.stops), default=1) - 1
        lengths = range(min(longest, len(self._held)), 0, -1)
        return next((n for n in lengths if any(stop.startswith(self._held[-n:]) for stop in self.stops)), 0)


@dataclass(frozen=True)
class Continuation:
    """What one step added to the text of one prompt.

    Attributes:
        prompt: its place in the list.
        token: the new token.
        text: the text to show, perhaps none.
        finished: why it ends here; None while it goes on.
        state_bytes: of the whole batch.
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
    device: torch.device | str = "cpu",
) -> Iterator[Continuation]:
    """Continues every prompt (`tokenizer.encode`) as text; stop strings and what follows them are not part of
    it.

    Arguments and errors: see :func:`generate`.
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
