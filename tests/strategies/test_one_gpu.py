"""Every strategy trains on one GPU and learns the same. `make gpu`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mhla_lightning.cli.main import main
from mhla_lightning.runs.folder import read_metrics
from mhla_lightning.strategies.config import ALLOWED

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ACCELERATOR = "gpu"
OTHERS = [name for name in ALLOWED if "nvme" not in name and name != "auto"]  # NVMe: test_zero_gpu.py


def curve(recipe: Path, root: Path, strategy: str) -> list[float]:
    """Return the losses of twelve steps under a strategy."""
    place = ["--runs", str(root), "--run-id", strategy, "--trainer.accelerator", ACCELERATOR]
    place += ["--trainer.strategy", strategy, "--trainer.precision", "bf16-mixed", "--trainer.devices", "1"]
    assert main(["run", str(recipe), *place]) == 0
    return [loss for _, loss in read_metrics(root / strategy / "metrics.jsonl")["train/loss"]]


@pytest.mark.parametrize("strategy", OTHERS)
def test_a_strategy_learns_what_one_process_learns(recipe: Path, tmp_path: Path, strategy: str) -> None:
    if strategy.startswith("zero"):
        pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    expected, found = (curve(recipe, tmp_path / "all", name) for name in ("auto", strategy))
    assert len(found) == 12
    assert found == pytest.approx(expected, rel=2e-2)
    assert found[-1] < found[0]
