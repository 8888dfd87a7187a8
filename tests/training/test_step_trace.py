"""`trainer.profiler: pytorch`: a small trace of training steps alone, which Perfetto can open."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from mhla_lightning.cli.main import main


def test_a_run_traces_three_micro_batches(recipe: Path, tmp_path: Path) -> None:
    arguments = ["--trainer.profiler", "pytorch", "--trainer.max_steps", "9", "--run-id", "profile"]
    arguments += ["--trainer.limit_val_batches", "0"]
    assert main(["run", str(recipe), *arguments]) == 0
    (path,) = (tmp_path / "runs" / "profile" / "tensorboard").glob("*.json*")
    assert path.name == "trace-rank-0.json.gz"
    assert path.stat().st_size < 2**20
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    slices = [event for event in events if event.get("ph") == "X"]
    assert all(event["dur"] >= 0 and event["ts"] > 0 for event in slices)
    named = [event["name"] for event in slices if event.get("cat") == "user_annotation"]
    assert named.count("run_training_batch") == 3
    assert sum(name.endswith(".training_step") for name in named) == 3
    assert any(name.endswith(".optimizer_step") for name in named)
    assert sum("Optimizer.step#AdamW" in name for name in named) == 3
    operators = {event["name"] for event in slices if event.get("cat") == "cpu_op"}
    assert {"aten::mm", "aten::addmm"} & operators


def test_a_run_that_is_too_short_says_so(
    recipe: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = ["--trainer.profiler", "pytorch", "--trainer.max_steps", "2", "--run-id", "short"]
    assert main(["run", str(recipe), *arguments]) == 0
    assert "the run has 2 micro batches, and a trace needs 9" in caplog.text
    assert not list((tmp_path / "runs" / "short" / "tensorboard").glob("*.json*"))
