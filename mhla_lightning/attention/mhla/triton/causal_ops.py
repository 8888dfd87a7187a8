"""The causal kernels as operators of torch, with gradients and FLOP formulas; see `ops.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mhla_lightning.attention.base import full_precision
from mhla_lightning.attention.mhla.triton import causal as form
from mhla_lightning.attention.mhla.triton.choice import CausalSizes, causal_dense_is_cheaper
from mhla_lightning.attention.mhla.triton.terms import CausalTerms

FORMS = ("dense", "chunks")


def triton_causal_mhla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    terms: CausalTerms,
    size: int,
    *,
    offset: float,
    eps: float | None,
    form: str | None = None,
) -> Tensor:
    """Compute causal MHLA with relu features on Triton kernels.

    Args:
        q, k: (batch, tokens, heads, dim_k), before the feature map relu(x) + offset.
        v: (batch, tokens, heads, dim_v) of their dtype.
        terms: mixing, scale, decay and documents.
        size: tokens per chunk.
        offset: added by the feature map.
        eps: added to the normalizer; None means no normalizer.
        form: `dense` or `chunks`; None takes the cheaper one.

    Returns:
        (batch, tokens, heads, dim_v) in v's dtype; 0 at padding.
    """
    if form is None:
        sizes = CausalSizes(q.shape[0] * q.shape[2], terms.chunks, size, q.shape[3], v.shape[3])
        form = "dense" if causal_dense_is_cheaper(sizes) else "chunks"
    numbers = [offset] if eps is None else [offset, eps]
    inputs = (q, k, v, terms.weights, terms.until, terms.after, terms.layout, terms.turns)
    return causal(*inputs, [size, int(form == "chunks")], numbers)[0]


@torch.library.custom_op("mhla::causal", mutates_args=())
def causal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Tensor,
    until: Tensor | None,
    after: Tensor | None,
    layout: Tensor | None,
    turns: Tensor | None,
    plan: Sequence[int],
    numbers: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the output, 1 / normalizer, mixed means and sums, means and sums of chunks.

    Args:
        q, k, v: see :func:`triton_causal_mhla`.
        weights, until, after, layout, turns: see :class:`CausalTerms`.
        plan: tokens per chunk, and 1 where the form in chunks is taken, else 0.
        numbers: the offset of the feature map, and eps where there is a normalizer.
    """
    terms = CausalTerms(weights, layout, until, after, turns)
    with full_precision(q):
        return form.forward(q, k, v, terms, form.CausalPlan(plan[0], bool(plan[1]), *numbers))


@causal.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Tensor,
    until: Tensor | None,
    after: Tensor | None,
    layout: Tensor | None,
    turns: Tensor | None,
    plan: Sequence[int],
    numbers: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, tokens, heads, dim = q.shape
    lead = (batch, heads, weights.shape[-1], dim)
    far, normalize = plan[1], len(numbers) > 1
    inverse = q.new_empty((batch, heads, tokens if normalize else 0), dtype=torch.float32)
    summary = q.new_empty((*lead, v.shape[3]) if far else (0,) * 5)
    z = inverse.new_empty(lead if far and normalize else (0,) * 4)
    mixed, z_mixed = torch.empty_like(summary), torch.empty_like(z)
    return v.new_empty(v.shape), inverse, mixed, z_mixed, summary, z


@torch.library.custom_op("mhla::causal_backward", mutates_args=())
def causal_backward(
    grad: Tensor,
    tokens: Sequence[Tensor],
    weights: Tensor,
    until: Tensor | None,
    after: Tensor | None,
    layout: Tensor | None,
    turns: Tensor | None,
    saved: Sequence[Tensor],
    plan: Sequence[int],
    numbers: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v, weights, `until` and `after`; absent ones are empty."""
    terms = CausalTerms(weights, layout, until, after, turns)
    with full_precision(grad):
        return form.backward(grad, tokens, terms, saved, form.CausalPlan(plan[0], bool(plan[1]), *numbers))


@causal_backward.register_fake
def _(
    grad: Tensor,
    tokens: Sequence[Tensor],
    weights: Tensor,
    until: Tensor | None,
    after: Tensor | None,
    layout: Tensor | None,
    turns: Tensor | None,
    saved: Sequence[Tensor],
    plan: Sequence[int],
    numbers: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty(x.shape) for x in tokens)
    d_until, d_after = (weights.new_empty((0,) * 4 if x is None else x.shape) for x in (until, after))
    return dq, dk, dv, weights.new_empty(weights.shape), d_until, d_after


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.plan, ctx.numbers = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 10
    q, k, v, *terms = ctx.saved_tensors[:8]
    saved, (_, until, after, *_) = ctx.saved_tensors[8:], terms
    numbers = (ctx.plan, ctx.numbers)
    *gradients, d_until, d_after = causal_backward(grad, [q, k, v], *terms, list(saved), *numbers)
    decays = (None if x is None else d for x, d in ((until, d_until), (after, d_after)))
    return (*gradients, *decays, *(None,) * 4)


causal.register_autograd(_differentiate, setup_context=_save)

Shape = Sequence[int]


def _products(q: Shape, weights: Shape, plan: Sequence[int], by_k: int, by_v: int, dim_v: int) -> int:
    """Return the FLOPs of products of pairs of tokens, and with `far` those of means of chunks."""
    (batch, _, heads, dim), (size, far) = q, plan
    chunks = weights[-1]
    pairs = chunks * size**2 if far else (chunks * size) ** 2
    flops = batch * heads * pairs * (by_k * dim + by_v * dim_v)  # half of the pairs
    means = 2 * batch * heads * dim * dim_v * (2 * chunks * size + chunks**2)
    return flops + (means * max(1, by_k - 1) if far else 0)


@register_flop_formula(torch.ops.mhla.causal)
def _causal_flops(
    q: Shape,
    k: Shape,
    v: Shape,
    weights: Shape,
    until: Shape | None,
    after: Shape | None,
    layout: Shape | None,
    turns: Shape | None,
    plan: Sequence[int],
    *_: Any,
    **__: Any,
) -> int:
    return _products(q, weights, plan, 1, 1, v[3])


@register_flop_formula(torch.ops.mhla.causal_backward)
def _causal_backward_flops(
    grad: Shape,
    tokens: Sequence[Shape],
    weights: Shape,
    until: Shape | None,
    after: Shape | None,
    layout: Shape | None,
    turns: Shape | None,
    saved: Sequence[Shape],
    plan: Sequence[int],
    *_: Any,
    **__: Any,
) -> int:
    return _products(tokens[0], weights, plan, 3, 2, tokens[2][3])
