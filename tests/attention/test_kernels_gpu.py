"""The compiled Triton kernels on a GPU: bf16 against float64, the same bits twice, and one node for Inductor.

`make gpu`. The same cases run on a CPU in Triton's interpreter, at smaller sizes: test_triton_*.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mhla_lightning.attention import build_attention
from tests.helpers.causal_kernel_cases import CausalKernelCase, causal_errors
from tests.helpers.kernel_cases import KernelCase, errors
from tests.helpers.rounding import FORWARD, GRADIENT, rounding

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BF16, FP16 = torch.bfloat16, torch.float16
CASES = [
    KernelCase("dense", (16, 16), (4, 4), 64, 64, heads=3, whole=True, dtype=BF16),
    KernelCase("dense", (16, 16), (4, 4), 64, 64, heads=3, dtype=BF16),
    KernelCase("dense", (16, 16), (4, 4), 72, 72, dtype=BF16),
    KernelCase("dense", (18, 18), (3, 4), 8, 24, per_head=True, dtype=BF16),
    KernelCase("dense", (3, 4, 3), (2, 3, 2), 72, 24, normalize=False, dtype=BF16),
    KernelCase("dense", (300,), (150,), 64, 128, dtype=FP16),
    KernelCase("dense", (196,), (196,), 64, 64, linear=True, whole=True, dtype=BF16),
    KernelCase("blocks", (32, 32), (8, 8), 64, 64, dtype=BF16),
    KernelCase("blocks", (32, 32), (8, 8), 64, 64, dtype=FP16),
    KernelCase("blocks", (24, 24), (6, 6), 64, 64, per_head=True, dtype=BF16),
    KernelCase("blocks", (5, 7, 9), (2, 3, 4), 128, 128, normalize=False, rotary=True, dtype=BF16),
    KernelCase("blocks", (5, 7, 9), (2, 3, 4), 72, 72, rotary=True, float32_summaries=True, dtype=BF16),
    KernelCase("blocks", (300,), (128,), 128, 128, linear=True, dtype=BF16),
    KernelCase("blocks", (37,), (1,), 24, 24, dtype=BF16),
]
EVERYTHING = {"decay_span": "sequence", "normalizer": "block", "decay": "token"}
CAUSAL = [
    case
    for form in ("dense", "chunks")
    for case in (
        CausalKernelCase(form, ((300,),), 128, 256, {"chunk_size": 64}, dtype=BF16),
        CausalKernelCase(form, ((150, 1, 149), (200, 100)), 64, 64, {"chunk_size": 64}, dtype=BF16),
        CausalKernelCase(form, ((90, 61),), 72, 24, {"chunk_size": 20, **EVERYTHING}, dtype=BF16),
        CausalKernelCase(form, ((130,),), 64, 64, {"chunk_size": 32, "decay": "head"}, dtype=FP16),
        CausalKernelCase(form, ((130,),), 72, 64, {"chunk_size": 32}, dtype=BF16, rotary=True),
        CausalKernelCase(
            form, ((90, 61),), 64, 64, {"chunk_size": 20, **EVERYTHING}, dtype=BF16, rotary=True
        ),
    )
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_forward_and_all_gradients_equal_float64(case: KernelCase) -> None:
    found = errors(case, "cuda")
    assert len(found) == 5 - case.linear
    for name, error in found.items():
        assert error < rounding(case.dtype, FORWARD if name == "out" else GRADIENT), found


@pytest.mark.parametrize("case", CAUSAL, ids=lambda case: case.label)
def test_causal_kernels_equal_float64(case: CausalKernelCase) -> None:
    found = {name: error for name, (error, _) in causal_errors(case, "cuda").items()}
    assert len(found) >= 5
    for name, error in found.items():
        assert error < rounding(case.dtype, FORWARD if name == "out" else GRADIENT), found


ENTRIES: dict[str, tuple[dict[str, Any], bool]] = {
    "mhla": ({"name": "mhla", "blocks": 4}, False),
    "mhla in blocks": ({"name": "mhla", "block_size": 64}, False),
    "linear": ({"name": "linear"}, False),
    "causal mhla": ({"name": "mhla", "chunk_size": 64}, True),
}


def results(operator: torch.nn.Module, seed: int = 0) -> list[Tensor]:
    """Return output and gradients on fixed bf16 tokens."""
    torch.manual_seed(seed)
    q, k, v = (torch.randn(2, 512, 2, 64).to("cuda", BF16).requires_grad_() for _ in range(3))
    out = operator(q, k, v)
    return [out, *torch.autograd.grad(out.float().square().sum(), [q, k, v, *operator.parameters()])]


@pytest.mark.parametrize("name", ENTRIES)
def test_auto_takes_the_kernels_and_repeats_their_bits(name: str) -> None:
    entry, causal = ENTRIES[name]
    built: dict[str, Any] = {
        kernel: build_attention(
            {**entry, "kernel": kernel}, heads=2, dim_k=64, dim_v=64, grid=(512,), causal=causal
        ).to("cuda")
        for kernel in ("auto", "triton", "torch")
    }
    automatic, again, triton = (results(built[kernel]) for kernel in ("auto", "auto", "triton"))
    assert all(torch.equal(a, b) for a, b in zip(automatic, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(automatic, triton, strict=True))
    for got, want in zip(automatic, results(built["torch"]), strict=True):
        assert float((got - want).abs().max() / want.abs().max()) < rounding(BF16, GRADIENT)


@pytest.mark.parametrize("name", ["mhla", "causal mhla"])
def test_inductor_compiles_an_operator_whole(name: str) -> None:
    entry, causal = ENTRIES[name]
    operator = build_attention(entry, heads=2, dim_k=64, dim_v=64, grid=(512,), causal=causal).to("cuda")
    compiled: Any = torch.compile(operator, fullgraph=True)
    for got, want in zip(results(compiled), results(operator), strict=True):
        assert float((got - want).abs().max() / want.abs().max()) < rounding(BF16, 1)
