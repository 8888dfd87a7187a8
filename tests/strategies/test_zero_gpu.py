"""What a CPU cannot train: float16 with loss scaling, DeepSpeed's own optimizer on offloaded states. `make
gpu`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mhla_lightning.cli.main import main
from mhla_lightning.runs.folder import complete_checkpoints, read_metrics
from mhla_lightning.strategies.zero.nvme import disk
from tests.helpers.zero_runs import nvme

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


CASES = [("zero2", "16-mixed"), ("zero3", "16-mixed"), ("zero2", "bf16-mixed"), ("zero3", "bf16-true")]
CASES += [("zero2_offload", "32-true"), ("zero3_offload", "32-true")]


@pytest.mark.parametrize(("strategy", "precision"), CASES)
def test_trains_and_resumes(recipe: Path, tmp_path: Path, strategy: str, precision: str) -> None:
    assert_trains_and_resumes(recipe, tmp_path, strategy, precision)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_trains_and_resumes_with_states_on_a_disk(recipe: Path, tmp_path: Path, precision: str) -> None:
    if not disk._reads_and_writes():
        pytest.skip("libaio-dev is not installed")
    recipe.write_text(
        recipe.read_text().replace("embed_dim: 12", "embed_dim: 768")
    )  # DeepSpeed leaves less than 1 MiB in memory
    (tmp_path / "swap").mkdir()
    assert_trains_and_resumes(recipe, tmp_path, nvme(tmp_path), precision)
    assert not list((tmp_path / "swap").iterdir())


def assert_trains_and_resumes(recipe: Path, tmp_path: Path, strategy: str, precision: str) -> None:
    place = [
        "--trainer.accelerator",
        "gpu",
        "--trainer.strategy",
        strategy,
        "--trainer.precision",
        precision,
        "--run-id",
        "gpu",
    ]
    assert main(["run", str(recipe), *place, "--trainer.max_steps", "8"]) == 0
    assert main(["run", str(recipe), *place, "--trainer.max_steps", "12", "--accept-changes"]) == 0
    run = tmp_path / "runs" / "gpu"
    losses = read_metrics(run / "metrics.jsonl")["train/loss"]
    assert len(losses) == 12
    assert losses[-1][1] < losses[0][1]
    assert (complete_checkpoints(run)[-1] / "shards").is_dir()
