"""From logits to the next token of each sequence, drawn by a key of its own."""

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
    """How the next token is chosen: logits / temperature, then the `top_k` likeliest, then the fewest
    likeliest whose sum reaches `top_p`.

    Args:
        temperature: above 0; 1 takes the model's own distribution.
        top_k: tokens kept, the likeliest; None keeps all.
        top_p: probability kept, in (0, 1]; None keeps all.
        greedy: always the likeliest token; the first of equals.
        seed: of the draws.

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
                f"temperature is {self.temperature}; it lies above 0 (greedy takes the likeliest token)"
            )
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k is {self.top_k}; it counts the tokens kept, at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it lies above 0 and is at most 1")

    def probabilities(self, logits: Tensor) -> Tensor:
        """(B, V) logits -> (B, V) probabilities in float64, 0 where a token is left out."""
        exact = (
            torch.float32 if logits.device.type == "mps" else torch.float64
        )  # Apple's GPUs have no float64
        scaled = logits.to(exact) / self.temperature
        if self.top_k is not None and self.top_k < scaled.shape[-1]:
            order = scaled.argsort(dim=-1, descending=True, stable=True)
            scaled = scaled.scatter(-1, order[:, self.top_k :], -torch.inf)
        probabilities = scaled.softmax(-1)
        if self.top_p is None:
            return probabilities
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        left_out = ordered.cumsum(-1) - ordered >= self.top_p  # the likelier ones suffice
        kept = probabilities.masked_fill(torch.zeros_like(left_out).scatter(-1, order, left_out), 0)
        return kept / kept.sum(-1, keepdim=True)

    def choose(self, logits: Tensor, keys: Sequence[str], position: int) -> Tensor:
        """The next token of each sequence, int64 (B,).

        logits: (B, V). keys: of each sequence (`sequence_keys`). position: which new token it is, from 0.

        A draw depends on (seed, key, position) alone and is read off the distribution in the order of the
        vocabulary, so neither the other sequences of a batch nor the last bits of its logits change it.

        Raises:
            UserError: logits that are not finite.
        """
        if not logits.max(-1).values.isfinite().all():
            raise UserError(
                "the model's logits are not finite numbers: these weights have diverged, or the "
                "--dtype is too narrow for them"
            )
        if self.greedy:
            return logits.argmax(-1)
        draws = [generator(self.seed, "token", key, position).random() for key in keys]
        sums = self.probabilities(logits).cumsum(-1)
        whole = sums[:, -1:]
        target = torch.tensor(draws, dtype=sums.dtype, device=sums.device)[:, None] * whole
        # The first sum above the target, which rounding must not lift to the whole: so no token of
        # probability 0 is ever taken.
        return torch.searchsorted(sums, target.minimum(whole.nextafter(torch.zeros_like(whole))), right=True)[
            :, 0
        ]


def sequence_keys(prompts: Sequence[Sequence[int]]) -> list[str]:
    """A key for each prompt's draws: its tokens, and how many equal ones stand before it.

    So a prompt is continued in the same way alone and among others, and one that is given twice is continued
    in two ways.
    """
    before: Counter[str] = Counter()
    keys = []
    for prompt in prompts:
        digest = hashlib.blake2b(",".join(map(str, prompt)).encode(), digest_size=16).hexdigest()
        keys.append(f"{digest}-{before[digest]}")
        before[digest] += 1
    return keys
