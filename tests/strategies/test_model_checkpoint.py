"""Lightning's ModelCheckpoint under ZeRO: whole files, which any strategy resumes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from mhla_lightning.callbacks import EMA
from mhla_lightning.data import ImageDataModule, ReadingConfig
from mhla_lightning.strategies.zero.strategy import ZeroStrategy
from mhla_lightning.tasks import ClassificationTask
from mhla_lightning.tasks.optimization import OptimizerConfig, ScheduleConfig
from tests.helpers.ranks import ONE_THREAD

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore:.*LeafSpec.*", "ignore:.*does not have many workers.*", "ignore:The dirpath has changed"
    ),
]
ZERO3 = {"name": "zero3", "zero_optimization": {"stage3_param_persistence_threshold": 0}}
OPTIONS = {"img_size": 8, "patch_size": 2, "embed_dim": 12, "depth": 2, "num_heads": 2}
TAGS = ("val/loss", "val_ema/loss")


def trained(
    shards: str, out: str, strategy: Any, devices: int, accumulation: int, resume: str | None = None
) -> dict[str, float]:
    """Train to step 4, from a checkpoint of step 2 or from the start; return the losses of validation."""
    pl.seed_everything(0, workers=True)
    task = ClassificationTask(
        "deit_tiny",
        {"name": "mhla", "blocks": 2},
        OPTIONS,
        num_classes=4,
        optimizer=OptimizerConfig(lr=1.0e-2, eps=1.0e-3),
        schedule=ScheduleConfig(warmup_steps=1),
    )
    data = ImageDataModule(shards, 16, 8, image_size=8, reading=ReadingConfig(num_workers=0))
    saved = ModelCheckpoint(out, "{step}", every_n_train_steps=2, save_top_k=-1)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        max_steps=4,
        accumulate_grad_batches=accumulation,
        gradient_clip_val=0.5,
        logger=False,
        callbacks=[EMA(0.9), saved],
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(task, data, ckpt_path=resume, weights_only=True)
    return {tag: float(trainer.callback_metrics[tag]) for tag in TAGS}


def zero(name: str) -> ZeroStrategy:
    return ZeroStrategy(ZERO3 if name == "zero3" else name)


if __name__ == "__main__":
    shards, out, name = sys.argv[1:]
    unbroken = trained(shards, out, zero(name), 2, 1)
    again = trained(shards, f"{out}/again", zero(name), 2, 1, f"{out}/step=2.ckpt")
    Path(out, "losses.json").write_text(json.dumps([unbroken, again]))


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_whole_files_of_split_weights(name: str, shards: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "tests.strategies.test_model_checkpoint",
        str(shards),
        str(tmp_path),
        name,
    ]
    subprocess.run(command, check=True, env={**os.environ, **ONE_THREAD})
    unbroken, again = json.loads((tmp_path / "losses.json").read_text())
    assert again == unbroken, "resumed bit for bit"
    assert not list(tmp_path.glob(".*.parts"))
    one = trained(str(shards), str(tmp_path / "one"), "auto", 1, 2)
    assert unbroken == pytest.approx(one, abs=1e-5)
    resumed = trained(str(shards), str(tmp_path / "more"), "auto", 1, 2, str(tmp_path / "step=2.ckpt"))
    assert resumed == pytest.approx(one, abs=1e-5)
    mine, theirs = (
        torch.load(folder / "step=4.ckpt", weights_only=True) for folder in (tmp_path, tmp_path / "one")
    )
    assert mine.keys() == theirs.keys()
    for key, tensor in theirs["state_dict"].items():
        torch.testing.assert_close(mine["state_dict"][key], tensor, rtol=0, atol=1e-5)
    averages = [file["callbacks"][EMA().state_key]["average"] for file in (mine, theirs)]
    assert averages[0].keys() == averages[1].keys()
    states = [file["optimizer_states"][0]["state"] for file in (mine, theirs)]
    assert states[0].keys() == states[1].keys()
