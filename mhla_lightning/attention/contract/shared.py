"""Checks of operators of both kinds, and the padding of bidirectional ones."""

from __future__ import annotations

from contextlib import suppress

import torch

from mhla_lightning.attention.contract.subject import GRID, Broken, NotChecked, Subject, loud, rows
from mhla_lightning.errors import UserError

_GRIDS = (GRID, (7,), (1,))


def check_shape(subject: Subject) -> str:
    """Check shape and dtype of the output, on rows of any length."""
    for grid in _GRIDS:
        tokens = GRID[0] * GRID[1] if grid == GRID else grid[0]
        with suppress(UserError) if grid != GRID else torch.enable_grad():
            operator = subject.build(grid)
            x = subject.inputs(operator, tokens)
            out = operator(**x)
            if out.shape != x["v"].shape or out.dtype != x["v"].dtype:
                raise Broken(
                    f"{tokens} tokens give {tuple(out.shape)} {out.dtype}; it must be the shape and dtype of "
                    f"v, {tuple(x['v'].shape)} {x['v'].dtype}"
                )
    return "shape and dtype of v"


def check_samples(subject: Subject) -> str:
    """Check that no sample sees another one of its batch, and that a call leaves no trace."""
    operator = subject.build()
    x = subject.inputs(operator, batch=3)
    out = operator(**x)
    subject.close(operator(**rows(x, 1, 2)), out[1:2], "a sample alone")
    subject.close(operator(**x), out, "a second call")
    return "each sample as if alone"


def check_dense(subject: Subject) -> str:
    """Compare the output and all gradients with the dense reference."""
    compared = 0
    for grid in _GRIDS:
        with suppress(UserError) if grid != GRID else torch.enable_grad():
            operator = subject.build(grid)
            x = subject.inputs(operator, GRID[0] * GRID[1] if grid == GRID else grid[0])
            expected = subject.dense(operator, x)
            if expected is None:
                raise NotChecked("the operator gives no dense reference (Attention.dense)")
            out = operator(**x)
            subject.close(out, expected, f"grid {grid}")
            subject.same_gradients(operator, x, out, expected)
            compared += 1
    return f"output and gradients on {compared} grids"


def check_gradients(subject: Subject) -> str:
    """Compare gradients with finite differences along a random direction."""
    if subject.dtype != torch.float64:
        raise NotChecked("finite differences need float64")
    operator = subject.build()
    x = subject.inputs(operator)
    wanted = [*x.values(), *(p for p in operator.parameters() if p.requires_grad)]
    draw, step = torch.Generator().manual_seed(3), 1e-6
    along = [torch.randn(one.shape, dtype=one.dtype, generator=draw).to(one) for one in wanted]
    out = operator(**x)
    weight = torch.randn(out.shape, dtype=out.dtype, generator=draw).to(out)
    found = torch.autograd.grad(out, wanted, weight, allow_unused=True, materialize_grads=True)
    slope = sum(float((g * a).sum()) for g, a in zip(found, along, strict=True))
    ends = []
    with torch.no_grad():
        for sign in (1.0, -1.0):
            for one, a in zip(wanted, along, strict=True):
                one.add_(a, alpha=sign * step)
            ends.append(float((operator(**x) * weight).sum()))
            for one, a in zip(wanted, along, strict=True):
                one.sub_(a, alpha=sign * step)
    expected = (ends[0] - ends[1]) / (2 * step)
    if abs(slope - expected) > 1e-4 * max(1.0, abs(expected)):
        raise Broken(f"slope {slope:.6g} along a random direction, finite differences give {expected:.6g}")
    return "as finite differences"


def check_padding(subject: Subject) -> str:
    """Check that padded tokens count nowhere, on either side, and that their outputs are 0."""
    operator = subject.build()
    x = subject.inputs(operator)
    tokens = x["q"].shape[1]
    for side in ("left", "right"):
        mask = torch.ones(2, tokens, dtype=torch.bool, device=subject.device)
        mask[0, slice(0, 5) if side == "left" else slice(-5, None)] = False
        out = operator(**x, mask=mask)
        if (out[~mask] != 0).any():
            raise Broken(f"padded outputs are not 0 (padding {side})")
        subject.close(operator(**loud(x, mask, 1e3), mask=mask), out, f"other values in the {side} padding")
        subject.close(out[1:], operator(**rows(x, 1, 2)), "a full sample beside a padded one")
        expected = subject.dense(operator, x, mask)
        if expected is not None:
            subject.close(out, expected, f"padding {side}, dense")
    mask = torch.stack([torch.zeros(tokens), torch.ones(tokens)]).bool().to(subject.device)
    out = operator(**x, mask=mask)
    found = torch.autograd.grad(out.sum(), list(x.values()), allow_unused=True, materialize_grads=True)
    if not all(torch.isfinite(one).all() for one in (out, *found)):
        raise Broken("a sample of padding alone gives values or gradients that are not finite")
    return "left, right, and a sample of padding alone"


def check_rotary(subject: Subject) -> str:
    """Check that a turn shared by all tokens changes nothing, and one by position does."""
    operator = subject.build()
    x = subject.inputs(operator)
    draw = torch.Generator().manual_seed(3)
    turn = torch.linalg.qr(torch.randn(subject.dim_k, subject.dim_k, dtype=torch.float64, generator=draw))[0]
    turn = turn.to(x["q"])
    plain = operator(**x)
    subject.close(operator(**x, rotary=lambda y: y @ turn), plain, "the same turn for all tokens", 10)
    signs = torch.tensor([1.0, -1.0] * x["q"].shape[1]).to(x["q"])
    turned = operator(**x, rotary=lambda y: y * signs[: y.shape[1], None, None])
    if torch.allclose(turned, plain):
        raise Broken("a turn by position changes nothing, so positions are lost")
    return "q.k turned by position"
