"""200 steps of every family's CPU recipe on a GPU beside the CPU's curve, and compiled. `make gpu`."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
import torch

from tests.helpers.cpu_curves import RECIPES, golden, losses

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ACCELERATOR = "gpu"
LAST = 50  # steps at the end whose mean is compared; single steps drift apart
# Precision -> relative tolerance of the first ten steps, and of the mean of the last.
TOLERANCES = {"32-true": (5e-3, 0.05), "bf16-mixed": (2e-2, 0.1)}


@pytest.mark.parametrize("family", RECIPES)
@pytest.mark.parametrize("precision", TOLERANCES)
def test_a_gpu_learns_what_a_cpu_learns(family: str, precision: str, tmp_path: Path) -> None:
    expected = golden(family)
    trainer = {"trainer.accelerator": ACCELERATOR, "trainer.precision": precision}
    found = losses(family, tmp_path / "run", overrides=trainer)
    first, last = TOLERANCES[precision]
    assert found[:10] == pytest.approx(expected[:10], rel=first)
    assert statistics.mean(found[-LAST:]) == pytest.approx(statistics.mean(expected[-LAST:]), rel=last)
    assert statistics.mean(found[-LAST:]) < found[0]


@pytest.mark.parametrize("family", RECIPES)
@pytest.mark.parametrize("what", ["blocks", "whole"])
def test_inductor_trains_the_same(family: str, what: str, tmp_path: Path) -> None:
    expected = golden(family)
    overrides = {
        "trainer.accelerator": ACCELERATOR,
        "trainer.precision": "bf16-mixed",
        "model.compile": what,
    }
    found = losses(family, tmp_path / "run", steps=10, overrides=overrides)
    assert found == pytest.approx(expected[:10], rel=TOLERANCES["bf16-mixed"][0])
