"""Checks of precision, compilation and the FLOP count."""

from __future__ import annotations

import copy

import torch
from torch.utils.flop_counter import FlopCounterMode

from mhla_lightning.attention.contract.subject import ODD_TOKENS, TOKENS, Broken, Subject

_LONG = (16, 16)  # a grid whose sums bf16 alone would spoil
_ROUNDING = 2**-6  # bf16 keeps 8 bits


def check_bf16(subject: Subject) -> str:
    """Check that bf16 inputs under autocast give bf16, at bf16's own rounding."""
    grid = (_LONG[0] * _LONG[1],) if subject.kind.causal else _LONG
    operator = subject.build(grid, torch.float32)
    x = {name: one.detach().bfloat16() for name, one in subject.inputs(operator, 256).items()}
    with torch.no_grad():
        exact = copy.deepcopy(operator).double()(**{name: one.double() for name, one in x.items()})
        with torch.autocast(torch.device(subject.device).type, dtype=torch.bfloat16):
            half = operator(**x)
    if half.dtype != torch.bfloat16:
        raise Broken(f"bf16 inputs give {half.dtype}")
    off, largest = float((half.double() - exact).abs().max()), float(exact.abs().max())
    if not off <= _ROUNDING * largest:
        raise Broken(f"off by {off:.2g} at values up to {largest:.2g}: sums must be float32")
    return f"off by {off / largest:.1e} of the largest value at 256 tokens"


def check_compile(subject: Subject) -> str:
    """Check that torch.compile takes the operator without a graph break, and changes nothing."""
    torch.compiler.reset()
    operator = subject.build()
    x = subject.inputs(operator, ODD_TOKENS if subject.kind.causal else TOKENS)
    out, expected = torch.compile(operator, fullgraph=True, backend="aot_eager")(**x), operator(**x)
    subject.close(out, expected, "compiled")
    subject.same_gradients(operator, x, out, expected)
    return "one graph, same output and gradients"


def check_flops(subject: Subject) -> str:
    """Compare `flops` with what torch counts."""
    operator, tokens = subject.build(), ODD_TOKENS if subject.kind.causal else TOKENS
    x = {name: one.to("meta") for name, one in subject.inputs(operator, tokens, batch=1).items()}
    with FlopCounterMode(display=False) as counter:
        operator.to("meta")(**x)
    counted = counter.get_total_flops()
    given = operator.flops(tokens, subject.heads, subject.dim_k, subject.dim_v)
    if counted != given:
        raise Broken(f"flops() gives {given:,}, torch counts {counted:,}")
    return f"{given:,} at {tokens} tokens, as torch counts"
