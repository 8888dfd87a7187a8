"""Gated baselines of language models through the package flash-linear-attention (`fla`).

Its kernels are Triton's, so they run on CUDA devices only.
"""

from __future__ import annotations

import importlib
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from mhla_lightning.attention.arithmetic import ceil_div
from mhla_lightning.attention.base import CausalAttention, State, accumulation_dtype
from mhla_lightning.attention.baselines.causal_linear import LinearState
from mhla_lightning.attention.context import Context
from mhla_lightning.attention.packing import Packing
from mhla_lightning.errors import UserError, missing_extra

_CHUNK = 64  # tokens that the kernels compute at once
Kernel = Callable[..., tuple[Tensor, Tensor | None]]
"""(q, k, v, log decays, options) -> the output, and the state where it was asked for.

q and k are (batch, tokens, heads, dim_k); v and the output are (batch, tokens, heads, dim_v).
"""


def load_kernels(ops: str, name: str, device: torch.device) -> tuple[Kernel, Kernel]:
    """Return the kernels of `fla.ops` for many tokens and for the next one.

    On the meta device, where a recipe's model is checked and counted, they give shapes alone.

    Args:
        ops: module of fla.ops.
        name: of the attention entry.
        device: of the tensors.

    Raises:
        UserError: see :func:`check_kernels`.
    """
    if device.type == "meta":
        return _shapes, _shapes
    check_kernels(name, device)
    module = importlib.import_module(f"fla.ops.{ops}")
    return getattr(module, f"chunk_{ops}"), getattr(module, f"fused_recurrent_{ops}")


def _shapes(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, *, output_final_state: bool = False, **options: object
) -> tuple[Tensor, Tensor | None]:
    """Give the shapes of a kernel's results, on the meta device."""
    state = q.new_empty(len(q), v.shape[2], q.shape[3], v.shape[3]) if output_final_state else None
    return torch.empty_like(v), state


def check_kernels(name: str, device: torch.device) -> None:
    """Check that the kernels can run on a device.

    Args:
        name: of the attention entry.
        device: of the tensors.

    Raises:
        UserError: no CUDA device, or the package is not installed.
    """
    purpose, missing = f"attention '{name}'", find_spec("fla") is None
    if device.type != "cuda":
        also = " and the package 'flash-linear-attention' (pip install 'mhla-lightning[fla]')"
        raise UserError(
            "name",
            f"{purpose} needs a CUDA device{also if missing else ''}, and the device here is {device.type}; "
            "{name: linear, decay: token} runs anywhere",
        )
    if missing:
        raise UserError("name", missing_extra("flash-linear-attention", "fla", purpose))


class FlashOperator(CausalAttention):
    """Base of the operators here: one state (dim_k, dim_v) per head, no option, no parameter.

    Documents become sequences of their own. An operator can be built and its FLOPs counted anywhere; the
    first forward needs a CUDA device and the package. `step` has no backward.

    Class attributes:
        name: in CAUSAL_ATTENTION.
        ops: module of fla.ops.
    """

    name: ClassVar[str]
    ops: ClassVar[str]
    token_decay = True

    def __init__(self, *, heads: int, dim_k: int, dim_v: int, grid: Sequence[int] | None = None) -> None:
        super().__init__()

    @classmethod
    def check_device(cls, device: torch.device) -> None:
        check_kernels(cls.name, device)

    @abstractmethod
    def _inputs(
        self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor | None
    ) -> dict[str, Tensor]:
        """Return the kernel's inputs: q, k, v, the decay as `gate`, and for the delta rule `beta`."""

    def _scale(self, dim_k: int) -> float:
        return dim_k**-0.5

    def prepare(self, packing: Packing) -> None:
        packing.sequences()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        return self._by_kernel(q, k, v, context, keep=False)[0]

    def attend_prefill(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> tuple[Tensor, State]:
        out, total = self._by_kernel(q, k, v, context, keep=True)
        assert total is not None
        return out, LinearState(total, None)

    def _by_kernel(
        self, q: Tensor, k: Tensor, v: Tensor, context: Context, *, keep: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output and, with `keep`, the state (batch, heads, dim_k, dim_v)."""
        kernel, _ = load_kernels(self.ops, self.name, q.device)
        options = {"scale": self._scale(q.shape[-1]), "output_final_state": keep}
        packing = context.packed()
        if packing is None:
            return _call(kernel, self._prepared(q, k, v, context), **options)
        sequences, (batch, tokens) = packing.sequences(), q.shape[:2]
        total = None
        if keep:
            total = self.init_state(
                batch, heads=v.shape[2], dim_k=q.shape[-1], dim_v=v.shape[-1], device=v.device, dtype=v.dtype
            ).total
        if not len(sequences.rows):
            return torch.zeros_like(v), total
        # Padding is dropped before anything else is computed: it may hold NaN, and a gradient of 0 times NaN
        # is NaN.
        q, k, v = (sequences.join(x) for x in (q, k, v))
        log_decay, beta = (
            None if x is None else sequences.join(x) for x in (context.log_decay, context.beta)
        )
        rotary = context.rotary
        turn = None if rotary is None else lambda x: sequences.join(rotary(sequences.split(x, batch, tokens)))
        joined = replace(context, rotary=turn, log_decay=log_decay, beta=beta)
        out, ends = _call(kernel, self._prepared(q, k, v, joined), cu_seqlens=sequences.bounds, **options)
        if total is not None and ends is not None:
            total = total.index_copy(0, sequences.rows, ends.to(total.dtype))
        return sequences.split(out, batch, tokens), total

    def _prepared(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> dict[str, Tensor]:
        """Return the kernel's inputs with q and k turned, and q, k and v in the dtype of v."""
        given = self._inputs(q, k, v, self._needed("log_decay", context.log_decay), context.beta)
        if context.rotary is not None:
            given |= {"q": context.rotary(given["q"]), "k": context.rotary(given["k"])}
        return given | {key: given[key].to(v.dtype) for key in "qkv"}

    def _needed(self, gate: str, value: Tensor | None) -> Tensor:
        if value is None:
            raise UserError(
                gate,
                f"missing; attention '{self.name}' needs it, and CausalSelfAttention computes it from the "
                "tokens",
            )
        return value

    def init_state(
        self,
        batch: int,
        *,
        heads: int,
        dim_k: int,
        dim_v: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> LinearState:
        precise = accumulation_dtype(torch.empty(0, dtype=dtype))
        return LinearState(torch.zeros(batch, heads, dim_k, dim_v, device=device, dtype=precise), None)

    def attend_step(
        self, q: Tensor, k: Tensor, v: Tensor, state: State, context: Context
    ) -> tuple[Tensor, State]:
        assert isinstance(state, LinearState)
        _, kernel = load_kernels(self.ops, self.name, q.device)
        given = self._prepared(q, k, v, context)
        out, total = _call(
            kernel, given, scale=self._scale(q.shape[-1]), initial_state=state.total, output_final_state=True
        )
        assert total is not None
        return out, LinearState(total, None)

    def flops(self, tokens: int, heads: int, dim_k: int, dim_v: int) -> int:
        """Count the products of the chunkwise form; torch's counter does not see Triton's kernels."""
        places = ceil_div(tokens, _CHUNK) * _CHUNK
        return 2 * heads * places * (2 * dim_k * dim_v + _CHUNK * (dim_k + dim_v))


def _call(kernel: Kernel, given: dict[str, Tensor], **options: object) -> tuple[Tensor, Tensor | None]:
    """Call a kernel with the decays as its fourth argument.

    Their keyword differs between kernels. Their gradients are constants to torch, so a second derivative
    would lack terms; it is refused. A compiler refuses all second derivatives itself.
    """
    more = {key: x for key, x in given.items() if key == "beta"}
    out, total = kernel(given["q"], given["k"], given["v"], given["gate"], **more, **options)
    for x in (out, total):
        if x is not None and x.requires_grad and not torch.compiler.is_compiling():
            x.register_hook(_refuse_second_derivatives)
    return out, total


def _refuse_second_derivatives(grad: Tensor) -> None:
    if torch.is_grad_enabled():
        raise UserError(
            "create_graph", "found true; the kernels of flash-linear-attention have first derivatives only"
        )


class GatedLinearAttention(FlashOperator):
    """GLA (arXiv 2312.06635): one decay g in (0, 1) per key channel.

    S_t = diag(g_t) S_t-1 + k_t v_t^T, o_t = S_t^T q_t dim_k ** -0.5.
    """

    name, ops = "gla", "gla"
    channel_decay = True

    def _inputs(
        self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor | None
    ) -> dict[str, Tensor]:
        return {"q": q, "k": k, "v": v, "gate": log_decay}


class Mamba2(FlashOperator):
    """State space duality of Mamba-2 (arXiv 2405.21060), with SiLU on q, k and v.

    S_t = g_t S_t-1 + k_t (dt_t v_t)^T, o_t = S_t^T q_t. The step dt_t is -log g_t; the norm of the output
    takes the place of a factor per head between the two. Each head has its own q and k, and there is no skip.
    """

    name, ops = "mamba2", "simple_gla"

    def _inputs(
        self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor | None
    ) -> dict[str, Tensor]:
        return {"q": F.silu(q), "k": F.silu(k), "v": -log_decay.unsqueeze(-1) * F.silu(v), "gate": log_decay}

    def _scale(self, dim_k: int) -> float:
        return 1.0


class GatedDeltaNet(FlashOperator):
    """Gated DeltaNet (arXiv 2412.06464): the gated delta rule.

    S_t = g_t (I - beta_t k_t k_t^T) S_t-1 + beta_t k_t v_t^T, o_t = S_t^T q_t dim_k ** -0.5. SiLU is applied
    to q, k and v; then q and k are normalized to length 1.
    """

    name, ops = "gated_deltanet", "gated_delta_rule"
    token_beta = True

    def _inputs(
        self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor | None
    ) -> dict[str, Tensor]:
        q, k = (F.normalize(F.silu(x), dim=-1, eps=1e-6) for x in (q, k))
        return {"q": q, "k": k, "v": F.silu(v), "gate": log_decay, "beta": self._needed("beta", beta)}

    def flops(self, tokens: int, heads: int, dim_k: int, dim_v: int) -> int:
        """Count the products of the chunkwise form.

        To those of the other operators, each chunk adds k k^T and the inverse's products with k and v. It
        also reads the values that the state already holds.
        """
        places = ceil_div(tokens, _CHUNK) * _CHUNK
        delta = 2 * heads * places * (dim_k * dim_v + _CHUNK * (2 * dim_k + dim_v))
        return super().flops(tokens, heads, dim_k, dim_v) + delta
