"""Choose the next token of each sequence from its logits, with a random key per sequence."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mhla_lightning.errors import UserError
from mhla_lightning.randomness import generator


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    The logits are divided by `temperature`; then the `top_k` likeliest tokens are kept, and of these the
    fewest likeliest whose probabilities sum to `top_p`.

    Args:
        temperature: above 0; 1 keeps the model's own distribution.
        top_k: number of likeliest tokens to keep; None means all.
        top_p: probability to keep, in (0, 1]; None means all.
        greedy: always take the likeliest token; of equal ones the first.
        seed: of the random numbers.

    Raises:
        UserError: a value outside its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    greedy: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise UserError(
                "temperature",
                f"{self.temperature} is not a finite number above 0 (`greedy` takes the likeliest token)",
            )
        if self.top_k is not None and self.top_k < 1:
            raise UserError("top_k", f"{self.top_k} tokens are too few; keep at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError("top_p", f"{self.top_p} is not above 0 and at most 1")

    def probabilities(self, logits: Tensor) -> Tensor:
        """Turn logits (B, V) into probabilities (B, V) in float64, 0 for tokens that are not kept."""
        scaled = logits.to(_exact(logits.device)) / self.temperature
        if self.top_k is not None and self.top_k < scaled.shape[-1]:
            order = scaled.argsort(dim=-1, descending=True, stable=True)
            scaled = scaled.scatter(-1, order[:, self.top_k :], -torch.inf)
        probabilities = scaled.softmax(-1)
        if self.top_p is None:
            return probabilities
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        left_out = ordered.cumsum(-1) - ordered >= self.top_p  # likelier tokens already reach top_p
        kept = probabilities.masked_fill(torch.zeros_like(left_out).scatter(-1, order, left_out), 0)
        return kept / kept.sum(-1, keepdim=True)

    def choose(self, logits: Tensor, keys: Sequence[str], position: int) -> Tensor:
        """Choose the next token of each sequence, int64 (B,).

        The random number depends on (seed, key, position) alone and selects from the distribution in the
        order of the vocabulary. Other sequences of a batch therefore do not change a token, nor do the last
        bits of its logits.

        Args:
            logits: (B, V).
            keys: key of each sequence (:func:`sequence_keys`).
            position: number of the new token, from 0.

        Raises:
            UserError: logits that are not finite.
        """
        draws = self.room(len(keys), logits.device)
        self.send_draws(keys, position, draws)
        chosen, sound = self.select(logits, draws)
        self.check([0] if sound.all() else [-1])
        return chosen

    def room(self, batch: int, device: torch.device) -> Tensor:
        """Return memory for the random numbers of a token, (batch,)."""
        return torch.zeros(batch, dtype=_exact(device), device=device)

    def send_draws(self, keys: Sequence[str], position: int, into: Tensor) -> None:
        """Write the random number of each sequence without waiting for the device.

        Args:
            keys, position: as for `choose`.
            into: (batch,), see `room`.
        """
        if self.greedy:
            return
        draws = [generator(self.seed, "token", key, position).random() for key in keys]
        host = torch.tensor(draws, dtype=into.dtype)
        into.copy_(host.pin_memory() if into.is_cuda else host, non_blocking=True)

    def select(self, logits: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        """Choose as `choose` does, on the device alone.

        Args:
            logits: (B, V).
            draws: (B,), see `send_draws`.

        Returns:
            The tokens, int64 (B,), and whether the logits of each sequence are finite, bool (B,).
        """
        sound = logits.max(-1).values.isfinite()
        if self.greedy:
            return logits.argmax(-1), sound
        sums = self.probabilities(logits).cumsum(-1)
        whole = sums[:, -1:]
        target = draws[:, None] * whole
        # Take the first sum above the target. The target stays below the whole despite rounding, so that
        # no token of probability 0 is taken.
        below = target.minimum(whole.nextafter(torch.zeros_like(whole)))
        chosen = torch.searchsorted(sums, below, right=True)[:, 0]
        return chosen.clamp_max(logits.shape[-1] - 1), sound  # beyond it only without finite sums

    def check(self, chosen: Sequence[int]) -> None:
        """Refuse tokens below 0, which stand for logits that are not finite. Raises UserError."""
        if any(token < 0 for token in chosen):
            raise UserError(
                "logits",
                "the model gives numbers that are not finite: these weights have diverged, or `dtype` is "
                "too narrow for them",
            )


def _exact(device: torch.device) -> torch.dtype:
    """Return the dtype of probabilities; Apple's GPUs have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def sequence_keys(prompts: Sequence[Sequence[int]]) -> list[str]:
    """Return a random key for each prompt: its tokens and the number of equal prompts before it.

    A prompt is thus continued in the same way alone and among others, and a prompt that is given twice gets
    two different continuations.
    """
    before: Counter[str] = Counter()
    keys = []
    for prompt in prompts:
        digest = hashlib.blake2b(",".join(map(str, prompt)).encode(), digest_size=16).hexdigest()
        keys.append(f"{digest}-{before[digest]}")
        before[digest] += 1
    return keys
