"""The modelled table of the kernels, and their machine code for GPUs that are not here."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mhla_lightning.attention import BlockGrid
from mhla_lightning.bench.kernel_launches import (
    A100,
    CASES,
    H100,
    OperatorCase,
    kernel_launches,
    operator_times,
)

GOALS = {  # milliseconds on an H100, forward and backward
    "DeiT-T 224, batch 1,024": 0.45,
    "DiT-XL/2 256 px, batch 32": 0.09,
    "DiT-S/2 2,048 px, batch 4": 0.30,
    "Wan, 31,500 tokens, rotary": 0.70,
}


def case_of(name: str) -> OperatorCase:
    (case,) = [case for case in CASES if case.name == name]
    return case


@pytest.mark.parametrize("name", GOALS)
def test_modelled_times_keep_their_goals(name: str) -> None:
    (times,) = operator_times([case_of(name)])
    row = times.row()
    assert row["triton_ms"] <= GOALS[name]
    assert row["torch_ms"] > 5 * row["triton_ms"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_tokens_cross_memory_in_their_own_dtype(case: OperatorCase) -> None:
    """No tensor of a launch has the size of q in float32."""
    elements = case.tokens(1)[0].numel()
    for launch in [*kernel_launches(case)[0], *kernel_launches(case)[1]]:
        for name in (*launch.reads, *launch.writes):
            x = launch.arguments[name]
            assert x.dtype != torch.float32 or x.numel() < elements, (launch.name, name)


def test_a_row_that_fits_a_tile_takes_one_kernel_each_way() -> None:
    forward, backward = kernel_launches(case_of("DeiT-T 224, batch 1,024"))
    assert [launch.name for launch in forward] == ["dense_forward_kernel"]
    assert [launch.name for launch in backward] == ["dense_backward_kernel"]
    size = 2 * case_of("DeiT-T 224, batch 1,024").tokens(1)[0].numel()
    assert 12 * size < forward[0].bytes + backward[0].bytes < 12.3 * size


def test_a_slower_gpu_takes_longer() -> None:
    cases = [case_of("DeiT-T 224, batch 1,024")]
    (fast,), (slow,) = operator_times(cases, H100), operator_times(cases, A100)
    assert slow.row()["triton_ms"] > 1.5 * fast.row()["triton_ms"]


@pytest.mark.parametrize("form", ["dense", "blocks"])
def test_flops_are_counted_for_both_forms(form: str) -> None:
    from mhla_lightning.attention.mhla.triton.ops import triton_mhla

    grid = BlockGrid((4, 6), block_size=(2, 3))
    q, k, v = (torch.empty(2, 24, 3, 8, device="meta", requires_grad=True) for _ in range(3))
    mixing = torch.empty(4, 4, device="meta", requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        out = triton_mhla(q, k, v, mixing, grid, offset=0.0, eps=None, form=form)
    forward = counter.get_total_flops()
    assert forward == 2 * 2 * 3 * (24 * 24 * 16 if form == "dense" else 8 * 8 * (2 * 24 + 16))
    with FlopCounterMode(display=False) as counter:
        out.backward(torch.empty_like(out))
    assert counter.get_total_flops() == (2.5 if form == "dense" else 2) * forward
    assert mixing.grad is not None
    assert mixing.grad.shape == mixing.shape


SHIPPED = [
    (name, capability)
    for name in (
        "DeiT-T 224, batch 1,024",
        "DiT-XL/2 256 px, batch 32",
        "DiT-S/2 2,048 px, batch 4",
        "Wan, 31,500 tokens, rotary",
    )
    for capability in (80, 90)
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "capability"), SHIPPED)
def test_shipped_kernels_compile_without_spills(name: str, capability: int) -> None:
    from mhla_lightning.bench.kernel_code import SHARED_BYTES, compile_launch

    for both in kernel_launches(case_of(name), capability // 10):
        for launch in both:
            code = compile_launch(launch, capability)
            assert code.spilled == 0, code
            assert code.shared <= SHARED_BYTES[capability], code
            assert code.tensor_core > 0, code
