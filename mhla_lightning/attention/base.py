"""The contract of a token operator: q, k, v in, mixed values out."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from mhla_lightning.errors import UserError, unknown_name

Rotary = Callable[[Tensor], Tensor]
"""(batch, tokens, heads, dim) -> same shape; made by the backbone, which owns base, pairing and dtype."""

_SHARED_ARGUMENTS = ("self", "heads", "dim_k", "dim_v", "grid", "causal")


class Attention(nn.Module):
    """One operator, one instance a layer.

    A subclass takes ``heads, dim_k, dim_v, grid, causal`` and its own options by keyword;
    the options of an attention entry are read off that signature.

    Class attributes:
        supports_causal: whether ``causal=True`` can be built.
    """

    supports_causal = False
    causal: bool

    def __init__(self, *, causal: bool = False) -> None:
        super().__init__()
        if causal and not self.supports_causal:
            raise UserError(f"attention '{type(self).__name__.lower()}' has no causal form; it serves image and video models")
        self.causal = causal

    @abstractmethod
    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        grid: Sequence[int] | None = None,
        rotary: Rotary | None = None,
        mask: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        """Mixes values over tokens in raster order.

        Args:
            q, k: (batch, tokens, heads, dim_k), before the feature map.
            v: (batch, tokens, heads, dim_v).
            grid: token counts per axis; None takes the one given at construction.
            rotary: turns q and k. softmax applies it to both; linear operators after the feature map and in the numerator only.
            mask: (batch, tokens) bool, True = real token. Padded outputs are 0 and padded keys count nowhere.
            documents: (batch, tokens) int, causal operators only.

        Returns:
            (batch, tokens, heads, dim_v)
        """

    @abstractmethod
    def flops(self, tokens: int, heads: int, dim_k: int, dim_v: int) -> int:
        """Matrix-product FLOPs of one sample's forward, 2 a multiply-add, as torch's FlopCounterMode counts."""

    @classmethod
    def options(cls) -> tuple[str, ...]:
        """The operator's own keys in an attention entry."""
        return tuple(name for name in inspect.signature(cls.__init__).parameters if name not in _SHARED_ARGUMENTS)


FEATURE_MAPS = ("relu_eps", "relu", "elu", "identity")


def feature_map(name: str, eps: float) -> Callable[[Tensor], Tensor]:
    """phi: `relu_eps` is relu(x) + eps (the release's vision and video), `relu` its language model's, `elu` is elu(x) + 1.

    Raises:
        UserError: unknown name.
    """
    maps: dict[str, Callable[[Tensor], Tensor]] = {
        "relu_eps": lambda x: torch.relu(x) + eps,
        "relu": torch.relu,
        "elu": lambda x: torch.nn.functional.elu(x) + 1,
        "identity": lambda x: x,
    }
    if name not in maps:
        raise UserError(unknown_name("feature_map", name, FEATURE_MAPS))
    return maps[name]


def relu_offset(name: str, eps: float) -> float | None:
    """What the fused path adds behind its relu to be this feature map; None where it cannot be."""
    return {"relu": 0.0, "relu_eps": eps}.get(name)


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """Sums over tokens are taken in float32 at least: bf16 keeps 8 bits, and a summary adds thousands of terms (SPEC 1.4)."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def full_precision(x: Tensor) -> AbstractContextManager[Any]:
    """Leaves autocast on x's device (the meta device has none)."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def no_documents(documents: Tensor | None) -> None:
    """Refuses documents where every token sees all others."""
    if documents is not None:
        raise UserError("documents need a causal operator; a bidirectional one takes a mask")
