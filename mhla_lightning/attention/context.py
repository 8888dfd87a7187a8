"""The context of an attention call: everything beside q, k and v."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypedDict

from torch import Tensor

from mhla_lightning.attention.masks import check_mask
from mhla_lightning.attention.packing import Packing
from mhla_lightning.errors import UserError

Rotary = Callable[[Tensor], Tensor]
"""(batch, tokens, heads, dim) -> same shape. The backbone makes it and owns base, pairing and dtype."""


class PairRotary(ABC):
    """A rotary that turns neighbouring channels, alike in every sample.

    Triton kernels turn them inside.
    """

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """Turn (batch, tokens, heads, dim)."""

    @abstractmethod
    def turn_table(self) -> Tensor:
        """Return cosines and sines by token and pair, (tokens, dim / 2, 2) float32."""


class HalfRotary(ABC):
    """A rotary that turns channel d with channel d + dim / 2, by its own angle in every sample.

    Triton kernels turn them inside.

    Attributes:
        cos, sin: (batch or 1, tokens, 1, dim / 2).
    """

    cos: Tensor
    sin: Tensor

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """Turn (batch, tokens, heads, dim)."""


@dataclass(frozen=True, eq=False)
class Context:
    """Everything that an operator reads beside q, k and v.

    Attributes:
        grid: token counts per axis; None means the grid given at construction. Causal operators ignore it.
        rotary: turns q and k by position. Softmax applies it to both; linear operators apply it after the
            feature map and in the numerator only.
        mask: (batch, tokens) bool, True = real token; None means all tokens are real. Padding is left or
            right of a sequence. Padded outputs are 0 and padded keys count nowhere. Numbers are refused.
        documents: (batch, tokens) int, causal operators only. A run of equal numbers is a document, and no
            token sees another document.
        packing: the same mask and documents, prepared once for all layers; None prepares them per call.
        log_decay: (batch, tokens, heads), or (batch, tokens, heads, dim_k) for one decay per channel, at
            most 0. Operators with `token_decay` need it.
        beta: (batch, tokens, heads) in (0, 1), how much of each token is written. Operators with
            `token_beta` need it.
    """

    grid: Sequence[int] | None = None
    rotary: Rotary | None = None
    mask: Tensor | None = None
    documents: Tensor | None = None
    packing: Packing | None = None
    log_decay: Tensor | None = None
    beta: Tensor | None = None

    def __post_init__(self) -> None:
        check_mask(self.mask)

    def packed(self) -> Packing | None:
        """Return the packing; None where every token is real and a row is one document."""
        return Packing.of(self.mask, self.documents) if self.packing is None else self.packing


class ContextKeywords(TypedDict, total=False):
    """The fields of :class:`Context` as keywords of a call."""

    grid: Sequence[int] | None
    rotary: Rotary | None
    mask: Tensor | None
    documents: Tensor | None
    packing: Packing | None
    log_decay: Tensor | None
    beta: Tensor | None


def context_from(context: Context | None, keywords: ContextKeywords) -> Context:
    """Return the context of a call that gave either a context or keywords.

    Raises:
        UserError: both were given.
    """
    if context is None:
        return Context(**keywords)
    if keywords:
        raise UserError(
            "context",
            f"found beside the keywords {', '.join(keywords)}; pass a Context or keywords, not both",
        )
    return context
