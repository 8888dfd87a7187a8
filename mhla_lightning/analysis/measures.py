"""Numbers that describe an attention matrix, one per head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RANK_TOLERANCE = 1e-10
"""A singular value counts towards the rank above this share of the largest one."""

TITLES = {
    "rank": "rank",
    "effective_rank": "effective rank",
    "entropy": "entropy, nats",
    "relative_entropy": "relative entropy",
    "distance": "mean distance, tokens",
    "locality": "locality",
    "own_block": "share of the own block",
    "uniform_own_block": "the same if uniform",
    "empty_rows": "empty rows",
}
"""The measures of :func:`measure` in the order of tables, with their headings."""


@dataclass(frozen=True)
class TokenPlaces:
    """Where the tokens of a matrix are.

    Attributes:
        positions: (tokens, axes), on the token grid.
        blocks: (tokens,) int64, the block of each token.
        causal: whether a query sees only itself and tokens before it.
    """

    positions: Tensor
    blocks: Tensor
    causal: bool

    def visible(self) -> Tensor:
        """Return (tokens, tokens) bool: which keys a query may see."""
        tokens = len(self.blocks)
        seen = torch.ones(tokens, tokens, dtype=torch.bool, device=self.blocks.device)
        return seen.tril() if self.causal else seen

    def distances(self) -> Tensor:
        """Return (tokens, tokens) float64, Euclidean, in tokens."""
        places = self.positions.double()
        return torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist")


def attention_shares(matrix: Tensor) -> Tensor:
    """Return the share of each key in the attention of a query: |A| divided by its row sums.

    Shares make kinds of attention comparable whose rows do not sum to 1, or have negative entries. A row of
    zeros stays one.

    Args:
        matrix: (..., tokens, tokens); row = query.
    """
    sizes = matrix.abs()
    sums = sizes.sum(-1, keepdim=True)
    return sizes / sums.masked_fill(sums == 0, 1)


def singular_values(matrix: Tensor) -> Tensor:
    """Return the singular values (..., tokens) of a matrix with rows divided by sums of |A|.

    This scaling leaves the rank as it is.
    """
    sums = matrix.abs().sum(-1, keepdim=True)
    return torch.linalg.svdvals(matrix / sums.masked_fill(sums == 0, 1))


def numerical_rank(values: Tensor) -> Tensor:
    """Return the number of singular values (..., tokens) that are not rounding, (...) float64."""
    return (values > RANK_TOLERANCE * values[..., :1]).sum(-1).double()


def effective_rank(values: Tensor) -> Tensor:
    """Return exp of the entropy of singular values (..., tokens) as shares of their sum.

    It is 1 for a matrix of rank 1, and n for n equal singular values (Roy and Vetterli, 2007).
    """
    return _entropy(values / values.sum(-1, keepdim=True).clamp_min(1e-300)).exp()


def _entropy(shares: Tensor) -> Tensor:
    """Return the entropy of shares over the last axis, in nats."""
    return torch.special.entr(shares).sum(-1)


def measure(matrix: Tensor, places: TokenPlaces) -> dict[str, Tensor]:
    """Return every number of TITLES, (heads,) float64 each, as means over queries.

    - `rank`, `effective_rank`: of the matrix with rows divided by the sums of |A|.
    - `entropy`: of a query's shares, in nats. `relative_entropy` divides it by that of uniform shares over
      what the query sees; a query that sees one key counts nowhere in it.
    - `distance`: of keys from their query, weighed by the shares. `locality` is 1 minus the same over that
      of uniform shares: 0 is as far as uniform attention, 1 is the own token alone.
    - `own_block`: share of the keys of the query's block; `uniform_own_block` with uniform shares.
    - `empty_rows`: queries that attend to nothing, as a share; they count nowhere else but in the ranks.

    Args:
        matrix: (heads, tokens, tokens); row = query.
        places: of its tokens.
    """
    values = singular_values(matrix)
    shares, seen, distances = attention_shares(matrix), places.visible(), places.distances()
    kept = shares.sum(-1) > 0
    counts = seen.sum(-1)
    uniform = seen.double() / counts[:, None]
    same = (places.blocks[:, None] == places.blocks[None]).double()
    entropy, far = _entropy(shares), (shares * distances).sum(-1)
    uniform_far = (uniform * distances).sum(-1)
    several = counts > 1
    relative = entropy / counts.double().log().masked_fill(~several, 1)
    near = 1 - far / uniform_far.masked_fill(~several, 1)
    return {
        "rank": numerical_rank(values),
        "effective_rank": effective_rank(values),
        "entropy": _mean(entropy, kept),
        "relative_entropy": _mean(relative, kept & several),
        "distance": _mean(far, kept),
        "locality": _mean(near, kept & several),
        "own_block": _mean((shares * same).sum(-1), kept),
        "uniform_own_block": _mean((uniform * same).sum(-1).expand_as(far), kept),
        "empty_rows": 1 - kept.double().mean(-1),
    }


def _mean(values: Tensor, kept: Tensor) -> Tensor:
    """Return the mean over queries that are kept, (heads,); nan where there is none."""
    return torch.where(kept, values, 0).sum(-1) / kept.sum(-1)
