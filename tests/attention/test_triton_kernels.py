"""The Triton kernels against Eq. 5 in float64, in Triton's interpreter, at tiny awkward sizes."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from tests.helpers.kernel_cases import (
    KernelCase,
    check_operators,
    compiled_nodes,
    errors,
    operator_errors,
    refusals,
)

BF16, FP16 = torch.bfloat16, torch.float16
TOLERANCES = {torch.float32: 3e-7, FP16: 1e-3, BF16: 1.5e-2}  # of the largest value of the reference
GRADIENTS = {torch.float32: 2.5, FP16: 1, BF16: 1}
"""Times as much: float32 gradients of 128 channels, a rotary or a normalizer have more roundings."""

CASES = [
    KernelCase("dense", (5, 7), (2, 3), 8, 8, whole=True),
    KernelCase("dense", (4, 8), (2, 2), 16, 16, heads=1),
    KernelCase("dense", (3, 4, 3), (2, 3, 2), 72, 24, heads=1, normalize=False, whole=True),
    KernelCase("dense", (20,), (3,), 24, 40, per_head=True),
    KernelCase("dense", (11,), (11,), 8, 8, heads=1, linear=True, whole=True),
    KernelCase("dense", (20,), (7,), 16, 16, dtype=BF16),
    KernelCase("blocks", (3, 4), (2, 3), 24, 8, per_head=True),
    KernelCase("blocks", (3, 4, 3), (2, 3, 2), 72, 40, heads=1, normalize=False, rotary=True),
    KernelCase("blocks", (2, 3, 3), (2, 2, 3), 8, 8, heads=1, rotary=True),
    KernelCase("blocks", (44,), (40,), 8, 16, heads=1, normalize=False),
    KernelCase("blocks", (20,), (7,), 8, 8, heads=1, linear=True),
    KernelCase("blocks", (9,), (5,), 16, 16, dtype=BF16),
    KernelCase("blocks", (9,), (5,), 16, 16, dtype=BF16, float32_summaries=True),
]
LONG = [
    KernelCase("dense", (20,), (7,), 16, 16, dtype=FP16),
    KernelCase("blocks", (9,), (5,), 16, 16, dtype=FP16),
    KernelCase("dense", (300,), (150,), 8, 8, heads=1, dtype=FP16),
    KernelCase("dense", (18, 18), (3, 4), 8, 24, heads=1, per_head=True),
    KernelCase("dense", (18, 18), (3, 4), 8, 24, heads=1, normalize=False, dtype=BF16),
    KernelCase("dense", (40,), (1,), 24, 24),
    KernelCase("blocks", (37,), (1,), 24, 24),
    KernelCase("blocks", (3, 5, 7), (2, 2, 3), 128, 128, rotary=True, dtype=FP16),
    KernelCase("blocks", (3, 5, 7), (2, 2, 3), 72, 72, rotary=True, linear=True),
    KernelCase("blocks", (7, 9), (7, 9), 128, 128, heads=1, normalize=False),
]


@pytest.mark.parametrize(
    "case",
    [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in LONG)],
    ids=lambda case: case.label,
)
def test_forward_and_all_gradients_equal_the_reference(
    interpreted: ProcessPoolExecutor,
    case: KernelCase,
) -> None:
    found = interpreted.submit(errors, case).result()
    assert len(found) == 5 - case.linear
    tolerance = TOLERANCES[case.dtype]
    limits = dict.fromkeys(found, tolerance * GRADIENTS[case.dtype])
    limits["out"] = tolerance * (2 if case.rotary else 1)  # a rotary's table is rounded to float32
    assert all(found[name] < limits[name] for name in found), found


@pytest.mark.parametrize(
    "entry",
    [
        {"name": "mhla", "block_size": 3, "mix_per_head": True},
        {"name": "mhla", "block_size": 2, "normalizer": "none", "feature_map": "relu"},
        {"name": "linear"},
    ],
    ids=["mhla", "none", "linear"],
)
def test_an_operator_on_kernels_equals_its_torch_path(
    interpreted: ProcessPoolExecutor,
    entry: dict[str, object],
) -> None:
    found = interpreted.submit(operator_errors, entry).result()
    assert all(error < 1e-6 for error in found.values()), found


def test_torch_finds_no_fault_in_the_operators(interpreted: ProcessPoolExecutor) -> None:
    found = interpreted.submit(check_operators).result()
    assert len(found) > 8
    assert set(found.values()) == {"SUCCESS"}, found


@pytest.mark.parametrize("name", ["mhla", "linear"])
def test_a_compiler_sees_one_node(interpreted: ProcessPoolExecutor, name: str) -> None:
    blocks = {"blocks": 2} if name == "mhla" else {}
    calls, error = interpreted.submit(compiled_nodes, {"name": name, "kernel": "triton", **blocks}).result()
    assert len([call for call in calls if call.startswith("mhla.")]) == 1, calls
    assert error < 1e-6


@pytest.mark.parametrize(("name", "form"), [("mhla", "dense"), ("linear", "blocks")])
def test_second_derivatives_and_torch_func_are_refused(
    interpreted: ProcessPoolExecutor, name: str, form: str
) -> None:
    entry = {"name": name, "qk_norm": True, **({"blocks": 2} if name == "mhla" else {})}
    second, function = interpreted.submit(refusals, entry, form).result()
    assert f"{form}_backward" in second
    assert "no autograd formula" in second
    assert "torch.func" in function
