"""Gated baselines of language models by the kernels of flash-linear-attention (package `fla`): Triton, so
on CUDA devices only.
"""

from __future__ import annotations

import importlib
from abc import abstractmethod
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from mhla_lightning.attention.base import CausalAttention, Rotary, State, accumulation_dtype
from mhla_lightning.attention.baselines.causal_linear import LinearState
from mhla_lightning.attention.packing import Packing
from mhla_lightning.errors import UserError, missing_extra

_CHUNK = 64  # tokens that the kernels compute at once
Kernel = Callable[..., tuple[Tensor, Tensor | None]]
"""q, k (batch, tokens, heads, dim_k), v (batch, tokens, heads, dim_v), log decays -> the output as v, and
the state where it is asked for.
"""


def load_kernels(ops: str, name: str, device: torch.device) -> tuple[Kernel, Kernel]:
    """The kernels of `fla.ops` for many tokens and for the next one.

    Args:
        ops: module of fla.ops.
        name: of the attention entry.
        device: where the tensors are.

    Raises:
        UserError: no CUDA device.
    """
    if device.type != "cuda":
        raise UserError(
            f"attention '{name}' needs a CUDA device and got tensors on {device.type}; {{name: "
            f"linear, decay: token}} runs anywhere"
        )
    module = importlib.import_module(f"fla.ops.{ops}")
    return getattr(module, f"chunk_{ops}"), getattr(module, f"fused_recurrent_{ops}")


class FlashOperator(CausalAttention):
    """What the operators here share: documents as sequences of their own, one state (dim_k, dim_v) a head. No
    option, no parameter.

    Builds and counts anywhere; the first forward needs a CUDA device. `step` has no backward.

    Class attributes:
        name: in CAUSAL_ATTENTION.
        ops: module of fla.ops.

    Raises:
        UserError: the package is not installed.
    """

    name: ClassVar[str]
    ops: ClassVar[str]
    token_decay = True

    def __init__(self, *, heads: int, dim_k: int, dim_v: int, grid: Sequence[int] | None = None) -> None:
        super().__init__()
        if find_spec("fla") is None:
            raise UserError(missing_extra("flash-linear-attention", "fla", f"attention '{self.name}'"))

    @abstractmethod
    def _inputs(
        self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor | None
    ) -> dict[str, Tensor]:
        """What the kernel takes of every token: q, k, v, its decay as `gate`, and more."""

    def _scale(self, dim_k: int) -> float:
        return dim_k**-0.5

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
        beta: Tensor | None = None,
    ) -> Tensor:
        return self._attend(
            q, k, v, rotary, packing or Packing.of(mask, documents), log_decay, beta, keep=False
        )[0]

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rotary: Rotary | None,
        packing: Packing | None,
        log_decay: Tensor | None,
        beta: Tensor | None,
        keep: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """The output, and where it is to be kept the state (batch, heads, dim_k, dim_v) behind one
        document a row.
        """
        kernel, _ = load_kernels(self.ops, self.name, q.device)
        options = {"scale": self._scale(q.shape[-1]), "output_final_state": keep}
        if packing is None:
            return _call(kernel, self._prepared(q, k, v, rotary, log_decay, beta), **options)
        sequences, (batch, tokens) = packing.sequences(), q.shape[:2]
        total = None
        if keep:
            total = self.init_state(
                batch, heads=v.shape[2], dim_k=q.shape[-1], dim_v=v.shape[-1], device=v.device, dtype=v.dtype
            ).total
        if not len(sequences.rows):
            return torch.zeros_like(v), total
        # Padding goes before anything else is computed: it may hold anything, also NaN, and a gradient of 0
        # times NaN is NaN.
        q, k, v = (sequences.join(x) for x in (q, k, v))
        log_decay, beta = (None if x is None else sequences.join(x) for x in (log_decay, beta))
        turn = None if rotary is None else lambda x: sequences.join(rotary(sequences.split(x, batch, tokens)))
        out, ends = _call(
            kernel, self._prepared(q, k, v, turn, log_decay, beta), cu_seqlens=sequences.bounds, **options
        )
        if total is not None and ends is not None:
            total = total.index_copy(0, sequences.rows, ends.to(total.dtype))
        return sequences.split(out, batch, tokens), total

    def _prepared(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rotary: Rotary | None,
        log_decay: Tensor | None,
        beta: Tensor | None,
    ) -> dict[str, Tensor]:
        """q, k and v in one precision, that of v."""
        given = self._inputs(q, k, v, self._needed("log_decay", log_decay), beta)
        if rotary is not None:
            given |= {"q": rotary(given["q"]), "k": rotary(given["k"])}
        return given | {key: given[key].to(v.dtype) for key in "qkv"}

    def _needed(self, gate: str, value: Tensor | None) -> Tensor:
        if value is None:
            raise UserError(
                f"attention '{self.name}' needs {gate}, which CausalSelfAttention computes from the tokens"
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
        beta: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        packing = packing or Packing.of(mask, None)
        if packing is not None and packing.documents is not None:
            raise UserError("a state follows one document a row; leave documents out")
        out, total = self._attend(q, k, v, rotary, packing, log_decay, beta, keep=True)
        assert total is not None
        return out, LinearState(total, None)

    def step(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: State,
        *,
        rotary: Rotary | None = None,
        log_decay: Tensor | None = None,
        beta: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        assert isinstance(state, LinearState)
        _, kernel = load_kernels(self.ops, self.name, q.device)
        given = self._prepared(q, k, v, rotary, log_decay, beta)
        out, total = _call(
            kernel, given, scale=self._scale(q.shape[-1]), initial_state=state.total, output_final_state=True
        )
        assert total is not None
        return out, LinearState(total, None)

    def flops(self, tokens: int, heads: int, dim_k: int, dim_v: int) -> int:
        """What the chunkwise form multiplies in chunks of 64; torch's counter sees nothing of Triton's
        kernels.
        """
        places = -(-tokens // _CHUNK) * _CHUNK
        return 2 * heads * places * (2 * dim_k * dim_v + _CHUNK * (dim_k + dim_v))


def _call(kernel: Kernel, given: dict[str, Tensor], **options: object) -> tuple[Tensor, Tensor | None]:
    """The decays go fourth: their keyword differs from kernel to kernel."""
    more = {key: x for key, x in given.items() if key == "beta"}
    return kernel(given["q"], given["k"], given["v"], given["gate"], **more, **options)


class GatedLinearAttention(FlashOperator):
    """GLA (arXiv 2312.06635): S_t = diag(g_t) S_t-1 + k_t v_t^T, o_t = S_t^T q_t dim_k ** -0.5, one decay
    in (0, 1) a key channel.
    """

    name, ops = "gla", "gla"
    channel_decay = True

    def _inputs(
        self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor | None
    ) -> dict[str, Tensor]:
        return {"q": q, "k": k, "v": v, "gate": log_decay}


class Mamba2(FlashOperator):
    """Mamba-2's state space duality (arXiv 2405.21060): S_t = g_t S_t-1 + k_t (dt_t v_t)^T, o_t = S_t^T q_t,
    with SiLU on q, k and v.

    The step dt_t is -log g_t; the factor a head between the two is left to the norm of the output. Each head
    has its own q and k, and none a skip.
    """

    name, ops = "mamba2", "simple_gla"

    def _inputs(
        self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor | None
    ) -> dict[str, Tensor]:
        return {"q": F.silu(q), "k": F.silu(k), "v": -log_decay.unsqueeze(-1) * F.silu(v), "gate": log_decay}

    def _scale(self, dim_k: int) -> float:
        return 1.0


class GatedDeltaNet(FlashOperator):
    """Gated DeltaNet (arXiv 2412.06464): S_t = g_t (I - beta_t k_t k_t^T) S_t-1 + beta_t k_t v_t^T, o_t =
    S_t^T q_t dim_k ** -0.5.

    SiLU on q, k and v; then q and k have length 1.
    """

    name, ops = "gated_deltanet", "gated_delta_rule"
    token_beta = True

    def _inputs(
        self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor | None
    ) -> dict[str, Tensor]:
        q, k = (F.normalize(F.silu(x), dim=-1, eps=1e-6) for x in (q, k))
        return {"q": q, "k": k, "v": F.silu(v), "gate": log_decay, "beta": self._needed("beta", beta)}

    def flops(self, tokens: int, heads: int, dim_k: int, dim_v: int) -> int:
        """Beside the shared ones, in each chunk k k^T, the inverse's products with k and v, and what the
        state already holds of the values.
        """
        places = -(-tokens // _CHUNK) * _CHUNK
        delta = 2 * heads * places * (dim_k * dim_v + _CHUNK * (2 * dim_k + dim_v))
        return super().flops(tokens, heads, dim_k, dim_v) + delta
