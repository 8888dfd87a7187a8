"""The contract of a token operator: it reads q, k and v and returns mixed values."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, replace
from functools import partial
from typing import Any, ClassVar, Protocol, Self, Unpack

import torch
from torch import Tensor, nn

from mhla_lightning.attention.context import Context, ContextKeywords, Rotary, context_from
from mhla_lightning.attention.packing import Packing, one_document_per_row
from mhla_lightning.errors import UserError, unknown_name

__all__ = ["Attention", "CausalAttention", "Context", "Rotary", "State"]

_SHARED_ARGUMENTS = ("self", "heads", "dim_k", "dim_v", "grid")


class Attention(nn.Module):
    """The operator of one layer.

    A subclass implements :meth:`attend` and :meth:`flops`. Its constructor takes ``heads, dim_k, dim_v,
    grid`` by keyword. Its own options are further keywords, or one argument ``options`` of the dataclass
    `options_type`. Either way they are the operator's keys in an attention entry.

    Class attributes:
        causal: whether tokens see earlier tokens only; see :class:`CausalAttention`.
        options_type: the frozen dataclass of the operator's options; None means plain keywords.
        example: options that serve short rows; `mhla test-operator` takes them.
        without_grid: whether it reads no grid, so that tokens without a place may be among the others, such
            as a class token.
    """

    causal: ClassVar[bool] = False
    without_grid: ClassVar[bool] = False
    options_type: ClassVar[type[Any] | None] = None
    example: ClassVar[Mapping[str, Any]] = {}

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        context: Context | None = None,
        **keywords: Unpack[ContextKeywords],
    ) -> Tensor:
        """Mix values over tokens in raster order.

        Args:
            q, k: (batch, tokens, heads, dim_k), before the feature map.
            v: (batch, tokens, heads, dim_v).
            context: everything else that the operator reads; None builds it from the keywords.
            keywords: the fields of :class:`Context`, instead of a context.

        Returns:
            (batch, tokens, heads, dim_v)
        """
        return self.attend(q, k, v, context_from(context, keywords))

    @classmethod
    def check_device(cls, device: torch.device) -> None:
        """Check that the operator runs on a device; a run asks before its first step.

        Raises:
            UserError: it does not.
        """
        return

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """Compute :meth:`forward`; the operator's own implementation."""

    @abstractmethod
    def flops(self, tokens: int, heads: int, dim_k: int, dim_v: int) -> int:
        """Return the matrix-product FLOPs of one sample's forward.

        A multiply-add counts 2, as in torch's FlopCounterMode.
        """

    def dense(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor | None:
        """Compute :meth:`attend` by its full matrix of tokens x tokens, for checks; slow and plain.

        A check gives no rotary and no documents. None means that the operator has no such form.
        """
        return None

    def rank_bound(self, grid: Sequence[int], dim_k: int) -> int | None:
        """Return the largest rank of a head's attention matrix; None where none is known.

        Args:
            grid: token counts per axis.
            dim_k: channels per head of q and k.
        """
        return None

    def partition(self, grid: Sequence[int]) -> tuple[int, ...] | None:
        """Return the tokens per axis of a block of this grid; None for an operator without blocks."""
        return None

    @classmethod
    def options(cls) -> tuple[str, ...]:
        """Return the operator's own keys in an attention entry."""
        if cls.options_type is not None:
            return tuple(field.name for field in fields(cls.options_type))
        return tuple(
            name for name in inspect.signature(cls.__init__).parameters if name not in _SHARED_ARGUMENTS
        )


class State(Protocol):
    """A causal operator's memory of the tokens so far; `step` may change it in place."""

    @property
    def bytes(self) -> int:
        """Bytes of all its tensors, as allocated."""

    def reorder(self, indices: Tensor) -> Self:
        """Return the sequences `indices` as a new batch.

        Args:
            indices: (any number,) int64, repeats allowed: for beam search, or to drop finished sequences.
        """


class CausalAttention(Attention):
    """An operator whose tokens see earlier tokens only.

    It runs in parallel (`forward`, `prefill`) or token by token (`step`), with the same numbers. Chunks and
    positions restart with each document and with the first real token, so packed, padded and single sequences
    give the same numbers.

    Class attributes:
        grouped: takes k and v of fewer heads than q (grouped queries); for all other operators the layer
            repeats them.
    Attributes:
        token_decay: needs `log_decay`, the log of a decay in (0, 1] that the layer computes per token.
        channel_decay: with `token_decay`, one decay per key channel.
        token_beta: needs `beta`.
    """

    causal: ClassVar[bool] = True
    grouped: ClassVar[bool] = False
    token_decay: bool = False
    channel_decay: bool = False
    token_beta: bool = False

    def prefill(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        context: Context | None = None,
        **keywords: Unpack[ContextKeywords],
    ) -> tuple[Tensor, State]:
        """Compute `forward` and the state after the last real token of each sequence.

        Raises:
            UserError: packed documents; a state follows one document per row.
        """
        context = context_from(context, keywords)
        packing = context.packed()
        one_document_per_row(packing)
        return self.attend_prefill(q, k, v, replace(context, packing=packing))

    def step(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: State,
        context: Context | None = None,
        **keywords: Unpack[ContextKeywords],
    ) -> tuple[Tensor, State]:
        """Process one more token of each sequence.

        Args:
            q, k: (batch, 1, heads, dim_k).
            v: (batch, 1, heads, dim_v).
            state: of the tokens so far.
            context: rotary, log_decay and beta of this token; None builds it from the keywords.
            keywords: the fields of :class:`Context`, instead of a context.

        Returns:
            (batch, 1, heads, dim_v), and the new state.
        """
        return self.attend_step(q, k, v, state, context_from(context, keywords))

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
        """Return the state before the first token; `heads` counts those of k and v."""

    def fix_state(self, state: State, tokens: int) -> None:
        """Prepare a state for steps that run without the host, where the operator has such steps.

        The state gets all the memory that it will take, and counts its tokens on the device.

        Args:
            state: changed in place.
            tokens: of a sequence at most, those of the state included.
        """

    def host_needed(self, state: State) -> str | None:
        """Return why steps after this state need the host; None where they do not.

        Without the host a step has the same launches at every position, and changes tensors alone, which
        keep their shapes. It is known after a step.
        """
        return "its state counts tokens on the host"

    def check_length(self, tokens: int) -> None:
        """Refuse a sequence of more tokens than the operator takes. Raises UserError."""

    def prepare(self, packing: Packing) -> None:
        """Compute ahead what :meth:`attend` reads of a packing, which keeps it."""

    @abstractmethod
    def attend_prefill(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> tuple[Tensor, State]:
        """Compute :meth:`prefill`; the operator's own implementation."""

    @abstractmethod
    def attend_step(
        self, q: Tensor, k: Tensor, v: Tensor, state: State, context: Context
    ) -> tuple[Tensor, State]:
        """Compute :meth:`step`; the operator's own implementation."""


FEATURE_MAPS = ("relu_eps", "relu", "elu", "identity")


def feature_map(name: str, eps: float) -> Callable[[Tensor], Tensor]:
    """Return the feature map phi of a name.

    Args:
        name: `relu_eps` is relu(x) + eps, the release's for vision and video; `relu` is its language model's;
            `elu` is elu(x) + 1; `identity` is x.
        eps: the offset of `relu_eps`.

    Raises:
        UserError: unknown name.
    """
    maps: dict[str, Callable[[Tensor], Tensor]] = {
        "relu_eps": partial(_relu_plus, offset=eps),
        "relu": torch.relu,
        "elu": _elu_plus_one,
        "identity": _identity,
    }
    known("feature_map", name, FEATURE_MAPS)
    return maps[name]


# Functions of the module, because a model is pickled with its feature map.
def _relu_plus(x: Tensor, offset: float) -> Tensor:
    return torch.relu(x) + offset


def _elu_plus_one(x: Tensor) -> Tensor:
    return torch.nn.functional.elu(x) + 1


def _identity(x: Tensor) -> Tensor:
    return x


def relu_offset(name: str, eps: float) -> float | None:
    """Return the offset that makes relu(x) + offset this feature map; None where there is none."""
    return {"relu": 0.0, "relu_eps": eps}.get(name)


def positive(key: str, value: object) -> None:
    """Refuse anything but a whole number above 0.

    Raises:
        UserError: with this key.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(key, f"found {value}; it must be a whole number of at least 1")


def known(key: str, value: str | None, names: tuple[str | None, ...]) -> None:
    """Refuse a name that is not in `names`.

    Raises:
        UserError: with this key and the nearest name.
    """
    if value not in names:
        spelled = ["null" if name is None else name for name in names]
        raise UserError(key, unknown_name("name", value, spelled))


def demand_decay(log_decay: Tensor | None) -> Tensor:
    """Return the decays that a gated operator needs.

    Raises:
        UserError: they are missing.
    """
    if log_decay is None:
        raise UserError(
            "log_decay",
            "missing; decay 'token' needs it, (batch, tokens, heads), and CausalSelfAttention computes it "
            "from the tokens",
        )
    return log_decay


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype for sums over tokens: float32 at least.

    bf16 keeps 8 bits, and a summary adds thousands of terms (SPEC 1.4).
    """
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def sent(values: Sequence[int] | Sequence[bool], device: torch.device) -> Tensor:
    """Return numbers of the host on a device, without a wait for it."""
    host = torch.tensor(values)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def full_precision(x: Tensor) -> AbstractContextManager[Any]:
    """Switch autocast off on x's device; the meta device has none."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def no_documents(documents: Tensor | None) -> None:
    """Refuse documents where every token sees all others.

    Raises:
        UserError: documents were given.
    """
    if documents is not None:
        raise UserError(
            "documents", "found some; only causal operators take them, a bidirectional one takes `mask`"
        )
