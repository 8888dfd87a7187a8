"""The compiled form of MHLA's N x N matrix.

Here is which calls it serves, what autograd needs of it, and what torch knows of its operators.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from mhla_lightning.attention.mhla.bidirectional import ReluMHLA
from mhla_lightning.attention.mhla.by_hand import WrittenForm
from mhla_lightning.attention.mhla.cpu import building

Shape = Sequence[int]


def serves(q: Tensor, settings: ReluMHLA) -> bool:
    """Return whether the compiled form can take the call.

    It takes real tensors of a CPU, with sums in float32. Fake tensors keep to torch's own
    operations, so that a plan does not depend on a compiler.
    """
    real = type(q) in (Tensor, Parameter) and q.device.type == "cpu"
    return real and settings.dtype == torch.float32 and _operators() is None


def _forward(
    q: Tensor, k: Tensor, v: Tensor, mixing: Tensor | None, settings: ReluMHLA
) -> tuple[Tensor, tuple[Tensor, ...]]:
    assert mixing is not None
    out, sums = torch.ops.mhla.short_rows(
        _readable(q), _readable(k), _readable(v), mixing.float().contiguous(), _blocks(settings),
        settings.offset, settings.eps, settings.normalize,
    )  # fmt: skip
    return out.to(v.dtype), (sums,)


def _backward(settings: ReluMHLA, grad: Tensor, saved: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    q, k, v, mixing, out, sums = saved
    *tokens, d_mixing = torch.ops.mhla.short_rows_backward(
        *map(_readable, (grad, q, k, v)), mixing.float().contiguous(), _blocks(settings),
        _readable(out), sums, settings.offset, settings.normalize,
    )  # fmt: skip
    by_matrix = d_mixing.sum(0) if mixing.dim() == 3 else d_mixing.sum((0, 1))
    grads = (x.to(of.dtype) for x, of in zip(tokens, (q, k, v), strict=True))
    return *grads, by_matrix.to(mixing.dtype)


FORM = WrittenForm(_forward, _backward)


def _blocks(settings: ReluMHLA) -> Tensor:
    return torch.frombuffer(settings.grid.block_numbers, dtype=torch.int64)


def _readable(x: Tensor) -> Tensor:
    """Return x in float32 with channels side by side."""
    x = x.float()
    return x if x.stride(-1) == 1 else x.contiguous()


@cache
def _operators() -> str | None:
    """Load the operators, and tell torch their shapes and FLOPs."""
    reason = building.loaded()
    if reason is None:
        from torch.utils.flop_counter import register_flop_formula  # imports Triton

        torch.library.register_fake("mhla::short_rows", _shapes)
        torch.library.register_fake("mhla::short_rows_backward", _gradient_shapes)
        register_flop_formula(torch.ops.mhla.short_rows)(_flops)
        register_flop_formula(torch.ops.mhla.short_rows_backward)(_gradient_flops)
    return reason


def _shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mixing: Tensor,
    block_of: Tensor,
    offset: float,
    eps: float,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, _ = q.shape
    return q.new_empty(v.shape), q.new_empty(batch, heads, tokens if normalize else 0)


def _gradient_shapes(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mixing: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_q, d_k, d_v = (x.new_empty(x.shape) for x in (q, k, v))
    blocks = mixing.shape[-1]
    return d_q, d_k, d_v, q.new_empty(q.shape[0], q.shape[2], blocks, blocks)


def _flops(q: Shape, k: Shape, v: Shape, *_: Any, **__: Any) -> int:
    batch, tokens, heads, dim = q
    return 2 * batch * heads * tokens**2 * (dim + v[3])


def _gradient_flops(grad: Shape, q: Shape, k: Shape, v: Shape, *_: Any, **__: Any) -> int:
    batch, tokens, heads, dim = q
    return 2 * batch * heads * tokens**2 * (3 * dim + 2 * v[3])
