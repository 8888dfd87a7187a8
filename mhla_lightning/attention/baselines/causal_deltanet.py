"""DeltaNet (arXiv 2406.06484) in plain torch: causal linear attention with the delta rule.

:func:`delta_rule_recurrent` is the definition, token by token. :func:`delta_rule` computes rows in chunks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mhla_lightning.attention import base
from mhla_lightning.attention.arithmetic import ceil_div
from mhla_lightning.attention.baselines.causal_linear import LinearState
from mhla_lightning.attention.chunks import split
from mhla_lightning.attention.context import Context
from mhla_lightning.attention.packing import DocumentChunks, Packing
from mhla_lightning.errors import UserError

_EPS = 1e-6  # beside the square of a length, as in flash-linear-attention; a key of 0 stays 0


def delta_rule_recurrent(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the delta rule token by token.

    S_t = S_t-1 + beta_t k_t (v_t - S_t-1^T k_t)^T and o_t = S_t^T q_t. A token is one step of gradient
    descent on |S^T k_t - v_t|^2 / 2, with the rate beta_t.

    Args:
        q, k: (batch, heads, tokens, dim_k).
        v: (batch, heads, tokens, dim_v).
        beta: (batch, heads, tokens).
        state: (batch, heads, dim_k, dim_v), S before the first token; None means 0.

    Returns:
        (batch, heads, tokens, dim_v), and S after the last token.
    """
    state = _no_state(k, v) if state is None else state
    outputs = []
    for t in range(q.shape[2]):
        key = k[:, :, t, :, None]
        wrong = v[:, :, t, None] - key.mT @ state  # (batch, heads, 1, dim_v)
        state = state + beta[:, :, t, None, None] * key @ wrong
        outputs.append(q[:, :, t, None] @ state)
    return torch.cat(outputs, 2), state


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    chunk_size: int = 64,
    packing: Packing | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute :func:`delta_rule_recurrent` in chunks, by the WY representation.

    The source is Sec. 3.2 of the paper.
    A chunk writes the values U = T V - T K S, where S is the state before it. The transform is
    T = (I + tril(diag(beta) K K^T, -1))^-1 diag(beta). Only S is handed from chunk to chunk.

    Args:
        q, k: (batch, heads, tokens, dim_k).
        v: (batch, heads, tokens, dim_v).
        beta: (batch, heads, tokens).
        chunk_size: tokens computed at once; the result does not depend on it.
        packing: of a padded or packed batch, whose documents each start with S = 0; None means one document
            per row.

    Returns:
        (batch, heads, tokens, dim_v), and S after the last document of each row,
        (batch, heads, dim_k, dim_v).
    """
    chunks, tokens = None if packing is None else packing.chunks(chunk_size), q.shape[2]
    q, k, v, beta = (split(x, chunk_size, chunks) for x in (q, k, v, beta.unsqueeze(-1)))
    transform = _wy_transform(k, beta)
    old, new, scores = transform @ k, transform @ v, (q @ k.mT).tril()
    state, outputs = _no_state(k, v), []
    for number in range(k.shape[2]):
        if chunks is not None:
            state = state.masked_fill(_begins(chunks, number)[:, None, None, None], 0)
        written = new[:, :, number] - old[:, :, number] @ state
        outputs.append(q[:, :, number] @ state + scores[:, :, number] @ written)
        state = state + k[:, :, number].mT @ written
    out = torch.stack(outputs, 2)
    if chunks is None:
        return out.flatten(2, 3)[:, :, :tokens], state
    return chunks.join(out.permute(0, 2, 3, 1, 4)).transpose(1, 2), state


def delta_rule_flops(tokens: int, heads: int, dim_k: int, dim_v: int, chunk_size: int) -> int:
    """Return the matrix-product FLOPs of one sample's forward in chunks, 2 per multiply-add.

    Per token these are a read of the state, a read of what it holds already, and an update. Each chunk adds
    q k^T, k k^T, T k, T v and the product of scores and values. As in torch's count, the inverse is free.
    """
    places = ceil_div(tokens, chunk_size) * chunk_size
    return 2 * heads * places * (3 * dim_k * dim_v + chunk_size * (3 * dim_k + 2 * dim_v))


def _wy_transform(k: Tensor, beta: Tensor) -> Tensor:
    """Return T of :func:`delta_rule`, (..., size, size).

    It is made of k (..., size, dim_k) and beta (..., size, 1). The matrix to invert has 1 on its diagonal, so
    a triangular solve is exact up to rounding. Powers of its lower part would be cheaper on a GPU, but where
    keys repeat they grow as binomial coefficients.
    """
    strength = ((beta * k) @ k.mT).tril(-1)
    return torch.linalg.solve_triangular(
        strength, torch.diag_embed(beta.squeeze(-1)), upper=False, unitriangular=True
    )


def _no_state(k: Tensor, v: Tensor) -> Tensor:
    return v.new_zeros(*v.shape[:2], k.shape[-1], v.shape[-1])


def _begins(chunks: DocumentChunks, number: int) -> Tensor:
    """Return (batch,) bool: whether this chunk of the row is the first of a document."""
    return (chunks.number[:, number] == 0) & (chunks.document[:, number] >= 0)


class DeltaNet(base.CausalAttention):
    """The delta rule (arXiv 2406.06484): a token overwrites what its key reads.

    S_t = (I - beta_t k_t k_t^T) S_t-1 + beta_t k_t v_t^T, o_t = S_t^T q_t dim_k ** -0.5. SiLU is applied to q
    and k, which are then normalized to length 1. Rotary turns them after that, which keeps their length.
    The output is linear in v. It is the reference of small models on a CPU; `gated_deltanet` has the
    kernels of a GPU.

    Args:
        chunk_size: tokens computed at once; the result does not depend on it.

    Raises:
        UserError: a chunk size below 1.
    """

    token_beta = True
    example = {"chunk_size": 8}  # noqa: RUF012  (read only)

    def __init__(
        self,
        *,
        heads: int,
        dim_k: int,
        dim_v: int,
        grid: Sequence[int] | None = None,
        chunk_size: int = 64,
    ) -> None:
        super().__init__()
        base.positive("chunk_size", chunk_size)
        self.chunk_size = chunk_size

    def prepare(self, packing: Packing) -> None:
        packing.chunks(self.chunk_size)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        return self.attend_prefill(q, k, v, context)[0]

    def attend_prefill(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> tuple[Tensor, LinearState]:
        packing = context.packed()
        with base.full_precision(q):
            given = _prepared(q, k, v, context)
            out, total = delta_rule(*given, chunk_size=self.chunk_size, packing=packing)
        return out.transpose(1, 2).to(v.dtype), LinearState(total, None)

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
        precise = base.accumulation_dtype(torch.empty(0, dtype=dtype))
        return LinearState(torch.zeros(batch, heads, dim_k, dim_v, device=device, dtype=precise), None)

    def attend_step(
        self, q: Tensor, k: Tensor, v: Tensor, state: base.State, context: Context
    ) -> tuple[Tensor, LinearState]:
        assert isinstance(state, LinearState)
        with base.full_precision(q):
            out, total = delta_rule_recurrent(*_prepared(q, k, v, context), state.total)
        return out.transpose(1, 2).to(v.dtype), LinearState(total, None)

    def host_needed(self, state: base.State) -> str | None:
        return None

    def dense(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """Compute o_t token by token, without chunks; see :meth:`Attention.dense`."""
        out, _ = delta_rule_recurrent(*_prepared(q, k, v, context))
        return out.transpose(1, 2)

    def flops(self, tokens: int, heads: int, dim_k: int, dim_v: int) -> int:
        return delta_rule_flops(tokens, heads, dim_k, dim_v, self.chunk_size)


def _prepared(q: Tensor, k: Tensor, v: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what :func:`delta_rule` takes, in the dtype of sums; q is scaled.

    Raises:
        UserError: no beta.
    """
    if context.beta is None:
        raise UserError(
            "beta",
            "missing; attention 'deltanet' needs it, (batch, tokens, heads), and CausalSelfAttention "
            "computes it from the tokens",
        )
    q, k, v, beta = (x.to(base.accumulation_dtype(x)) for x in (q, k, v, context.beta))
    q, k = _unit(F.silu(q)), _unit(F.silu(k))
    if context.rotary is not None:
        q, k = context.rotary(q), context.rotary(k)
    q = q * q.shape[-1] ** -0.5
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), beta.transpose(1, 2)


def _unit(x: Tensor) -> Tensor:
    """Return vectors of length 1 along the last axis, with all derivatives also where x is 0."""
    return x * (x.square().sum(-1, keepdim=True) + _EPS).rsqrt()
