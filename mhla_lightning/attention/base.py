"""The contract of a token operator: q, k, v in, mixed values out."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn

from mhla_lightning.attention.packing import Packing
from mhla_lightning.errors import UserError, unknown_name

Rotary = Callable[[Tensor], Tensor]
"""(batch, tokens, heads, dim) -> same shape; made by the backbone, which owns base, pairing and dtype."""

_SHARED_ARGUMENTS = ("self", "heads", "dim_k", "dim_v", "grid")


class Attention(nn.Module):
    """One operator, one instance a layer.

    A subclass takes ``heads, dim_k, dim_v, grid`` and its own options by keyword; the options of an attention
    entry are read off that signature.

    Class attributes:
        causal: whether tokens see earlier tokens only; see :class:`CausalAttention`.
    """

    causal: ClassVar[bool] = False

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
            rotary: turns q and k. softmax applies it to both; linear operators after the feature map and in
                the numerator only.
            mask: (batch, tokens) bool, True = real token. Padded outputs are 0 and padded keys count nowhere.
            documents: causal operators only, see :class:`CausalAttention`.

        Returns:
            (batch, tokens, heads, dim_v)
        """

    @abstractmethod
    def flops(self, tokens: int, heads: int, dim_k: int, dim_v: int) -> int:
        """Matrix-product FLOPs of one sample's forward, 2 a multiply-add, as torch's FlopCounterMode
        counts.
        """

    @classmethod
    def options(cls) -> tuple[str, ...]:
        """The operator's own keys in an attention entry."""
        return tuple(
            name for name in inspect.signature(cls.__init__).parameters if name not in _SHARED_ARGUMENTS
        )


class State(Protocol):
    """What a causal operator remembers of the tokens it has seen; `step` may change it in place."""

    @property
    def bytes(self) -> int:
        """Bytes of all its tensors, as allocated."""

    def reorder(self, indices: Tensor) -> Self:
        """The sequences `indices` (int64, any number, repeats allowed) as a new batch: beam search, or
        dropping finished sequences.
        """


class CausalAttention(Attention):
    """An operator whose tokens see earlier tokens only, in parallel (`forward`, `prefill`) or one by one
    (`step`): the same numbers.

    Chunks and positions start anew with each document and with the first real token, so packed, padded and
    alone give the same numbers.

    Class attributes:
        grouped: takes k and v of fewer heads than q (grouped queries) as they are; for all others the layer
            repeats them.
    Attributes:
        token_decay: needs `log_decay`, the log of a decay in (0, 1] that the layer computes from every token.
        channel_decay: with `token_decay`, one decay a key channel: `log_decay` is (batch, tokens, heads,
            dim_k).
        token_beta: `forward`, `prefill` and `step` also take `beta` (batch, tokens, heads) in (0, 1), how
            much of each token is written.
    """

    causal: ClassVar[bool] = True
    grouped: ClassVar[bool] = False
    token_decay: bool = False
    channel_decay: bool = False
    token_beta: bool = False

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
        packing: Packing | None = None,
        log_decay: Tensor | None = None,
    ) -> Tensor:
        """Mixes values over each token's own and earlier tokens.

        Args:
            q, k, v, rotary, mask: see :meth:`Attention.forward`. Padding stands left or right of a sequence.
            grid: ignored; there is one axis.
            documents: (batch, tokens) int; a run of equal numbers is a document, and no token sees another
                document.
            packing: of the same mask and documents, made once for all layers; None makes it here.
            log_decay: (batch, tokens, heads), with `channel_decay` (batch, tokens, heads, dim_k), at most 0;
                where `token_decay` is set.

        Returns:
            (batch, tokens, heads, dim_v)
        """

    @abstractmethod
    def init_state(
        self,
        batch: int,
        *,
        heads: int,
        dim_k: int,
        dim_v: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> State:
        """The state before the first token; heads are those of k and v."""

    @abstractmethod
    def prefill(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        rotary: Rotary | None = None,
        mask: Tensor | None = None,
        packing: Packing | None = None,
        log_decay: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """`forward` from the first token on, and the state behind the last real token of each sequence."""

    @abstractmethod
    def step(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: State,
        *,
        rotary: Rotary | None = None,
        log_decay: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """One more token of each sequence: q, k (batch, 1, heads, dim_k), v (batch, 1, heads, dim_v) ->
        (batch, 1, heads, dim_v).
        """


FEATURE_MAPS = ("relu_eps", "relu", "elu", "identity")


def feature_map(name: str, eps: float) -> Callable[[Tensor], Tensor]:
    """phi: `relu_eps` is relu(x) + eps (the release's vision and video), `relu` its language model's, `elu`
    is elu(x) + 1.

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


def positive(key: str, value: object) -> None:
    """Refuses what is no whole number above 0. Raises UserError."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{key} is {value}; it must be a whole number from 1 on")


def demand_decay(log_decay: Tensor | None) -> Tensor:
    """The decays that a gated operator cannot do without. Raises UserError."""
    if log_decay is None:
        raise UserError(
            "decay 'token' needs log_decay (batch, tokens, heads), which CausalSelfAttention "
            "computes from the tokens"
        )
    return log_decay


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """Sums over tokens are taken in float32 at least: bf16 keeps 8 bits, and a summary adds thousands of
    terms (SPEC 1.4).
    """
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def full_precision(x: Tensor) -> AbstractContextManager[Any]:
    """Leaves autocast on x's device (the meta device has none)."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def no_documents(documents: Tensor | None) -> None:
    """Refuses documents where every token sees all others."""
    if documents is not None:
        raise UserError("documents need a causal operator; a bidirectional one takes a mask")
