"""The curves that `make gpu` compares a GPU with are those of this version on a CPU."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from tests.helpers.cpu_curves import RECIPES, STEPS, golden, losses
from tests.helpers.marks import every_nth


@pytest.mark.parametrize("family", every_nth(RECIPES, 4))
def test_recipes_begin_as_in_the_golden_file(family: str, tmp_path: Path) -> None:
    expected = golden(family)
    assert len(expected) == STEPS
    assert statistics.mean(expected[-50:]) < 0.95 * expected[0]
    found = losses(family, tmp_path / "run", steps=3, overrides={"trainer.accelerator": "cpu"})
    assert found == pytest.approx(expected[:3], rel=1e-4)
