"""Continue prompts of any lengths in one batch: one prefill, then one step for each token."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor

from mhla_lightning.errors import UserError
from mhla_lightning.inference.text.sampling import Sampling, sequence_keys
from mhla_lightning.inference.text.token_graph import Decoding, Execution

Finish = Literal["end", "stop", "length"]
"""Why a sequence ended: the end-of-document token, the function `stop`, or max_new_tokens."""


class CausalBackbone(Protocol):
    """The methods of a language model that generation calls (`backbones.CausalLM`).

    A state has `.bytes` and `.reorder(indices)`.
    """

    def prefill(
        self, tokens: Tensor, mask: Tensor | None = None, all_logits: bool = False
    ) -> tuple[Tensor, Any]: ...

    def step(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]: ...


@dataclass(frozen=True)
class Step:
    """One new token of every unfinished sequence.

    Attributes:
        prompts: indices of the prompts.
        tokens: the new token of each of them, an end token included.
        finished: why a sequence ends with this token, by index of the prompt.
        state_bytes: bytes of the state of these sequences when the tokens were chosen.
    """

    prompts: list[int]
    tokens: list[int]
    finished: dict[int, Finish]
    state_bytes: int


def generate(
    backbone: CausalBackbone,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    max_new_tokens: int,
    *,
    end: int | None = None,
    stop: Callable[[int, int], bool] | None = None,
    padding: Literal["left", "right"] = "left",
    batch_size: int | None = None,
    vocabulary: int | None = None,
    device: torch.device | str | Execution = "cpu",
) -> Iterator[Step]:
    """Continue every prompt; a finished sequence leaves the batch and costs nothing more.

    Args:
        backbone: the model, in eval mode, on `device`.
        prompts: token ids; an empty prompt starts from `end`.
        sampling: how tokens are chosen.
        max_new_tokens: new tokens of each prompt at most.
        end: token that ends a sequence; None means no such token.
        stop: called with (prompt, token) once for every new token; True ends that sequence.
        padding: side on which shorter prompts are padded; it does not change the result.
        batch_size: prompts in the model at once, in the given order; None means all.
        vocabulary: only tokens below this number are chosen, since a model may have more ids than its
            tokenizer; None means all.
        device: of the model; an :class:`Execution` also says whether a CUDA graph holds a token.

    Raises:
        UserError: a count below 1, an empty prompt without `end`, more tokens than the model takes, or a
            CUDA graph that is demanded and impossible.
    """
    for name, count in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if count is not None and count < 1:
            raise UserError(name, f"{count} is too small; it must be at least 1")
    starts = start_tokens(prompts, end)
    keys = sequence_keys(starts)
    batch = batch_size or max(1, len(starts))

    execution = device if isinstance(device, Execution) else Execution(device)
    execution.wanted(backbone)  # raises

    def why(number: int, token: int, position: int) -> Finish | None:
        if token == end:
            return "end"
        if stop is not None and stop(number, token):
            return "stop"
        return "length" if position == max_new_tokens - 1 else None

    def batches() -> Iterator[Step]:
        for first in range(0, len(starts), batch):
            live = list(range(first, min(first + batch, len(starts))))
            tokens, mask = pad([starts[number] for number in live], padding, execution.device)
            with torch.inference_mode():
                logits, state = backbone.prefill(tokens, mask=mask)
                most = max_new_tokens + max(len(starts[number]) for number in live)
                decoding = Decoding(backbone, state, sampling, vocabulary, execution, most)
            yield from _continue(decoding, logits, live, keys, starts, why)

    return batches()


def start_tokens(prompts: Sequence[Sequence[int]], end: int | None) -> list[list[int]]:
    """Return the prompts as lists, with [end] for an empty prompt.

    Raises:
        UserError: an empty prompt where `end` is None.
    """
    if end is None and not all(prompts):
        number = next(number for number, prompt in enumerate(prompts, 1) if not prompt)
        raise UserError(
            "prompts",
            f"prompt {number} is empty, and the tokenizer has no end-of-document token to start from; "
            "give it some text",
        )
    return [list(prompt) or [cast(int, end)] for prompt in prompts]


@torch.inference_mode()
def _continue(
    decoding: Decoding,
    logits: Tensor,
    live: list[int],
    keys: Sequence[str],
    starts: Sequence[Sequence[int]],
    why: Callable[[int, int, int], Finish | None],
) -> Iterator[Step]:
    """Yield the steps of one batch until every sequence has ended.

    Args:
        decoding: after the prompts.
        logits: of the prompts' last tokens, (batch, V).
        live: prompts of the batch.
        keys, starts: key and tokens of every prompt.
        why: returns why a prompt ends with a token at a position, see `Finish`.
    """
    for position in itertools.count():
        if position == 0:
            new = decoding.first(logits, [keys[number] for number in live])
        else:
            new = decoding.next(position, position + max(len(starts[number]) for number in live))
        reasons = {number: why(number, token, position) for number, token in zip(live, new, strict=True)}
        finished = {number: reason for number, reason in reasons.items() if reason is not None}
        yield Step(live, new, finished, decoding.state.bytes)
        going = [row for row, number in enumerate(live) if number not in finished]
        if not going:
            return
        if len(going) < len(live):
            decoding.keep(going)
            live = [live[row] for row in going]


def pad(
    sequences: Sequence[Sequence[int]], side: Literal["left", "right"], device: torch.device | str
) -> tuple[Tensor, Tensor | None]:
    """Pad sequences of token ids to one length.

    Returns:
        int64 (B, longest), and the bool mask of real tokens, or None if all are equally long.
    """
    longest = max(map(len, sequences))
    tokens = torch.zeros(len(sequences), longest, dtype=torch.int64)
    mask = torch.zeros(len(sequences), longest, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        place = slice(longest - len(sequence), longest) if side == "left" else slice(0, len(sequence))
        tokens[row, place] = torch.tensor(sequence)
        mask[row, place] = True
    return tokens.to(device), None if mask.all() else mask.to(device)
