"""The average under a plain Trainer: in Lightning's own checkpoints, in ours, and with another task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from mhla_lightning.callbacks import EMA
from mhla_lightning.data import ImageDataModule
from mhla_lightning.data.modules.options import ReadingConfig
from mhla_lightning.tasks import ClassificationTask, OptimizerConfig, ScheduleConfig
from tests.helpers.errors import refused
from tests.helpers.probe import Probe

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*LeafSpec.*",
    "ignore:.*does not have many workers.*",
    "ignore:Checkpoint directory",
    "ignore:Be aware that when using `ckpt_path`",
)
OPTIONS = {"img_size": 8, "patch_size": 2, "embed_dim": 12, "depth": 1, "num_heads": 2}


def task(seed: int = 0) -> ClassificationTask:
    pl.seed_everything(seed, verbose=False)
    return ClassificationTask(
        "deit_tiny",
        {"name": "mhla", "blocks": 2},
        OPTIONS,
        num_classes=4,
        optimizer=OptimizerConfig(lr=1e-2),
        schedule=ScheduleConfig("constant"),
    )


def data(shards: Path) -> ImageDataModule:
    return ImageDataModule(str(shards), batch_size=16, image_size=8, reading=ReadingConfig(num_workers=0))


def trainer(ema: EMA, folder: Path | None = None, steps: int = 2) -> pl.Trainer:
    saves = [] if folder is None else [ModelCheckpoint(folder, save_last=True, every_n_train_steps=2)]
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        val_check_interval=steps,
        check_val_every_n_epoch=None,
        callbacks=[ema, *saves],
        enable_checkpointing=folder is not None,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


def slow() -> EMA:
    return EMA(0.9, warmup=False)


def fit(shards: Path, ema: EMA, folder: Path | None = None, steps: int = 2, **arguments: Any) -> float:
    """Return the loss of the averaged weights at the end."""
    running = trainer(ema, folder, steps)
    running.fit(task(), data(shards), weights_only=True, **arguments)
    return float(running.callback_metrics["val_ema/loss"])


def test_lightnings_own_checkpoint_holds_the_average(shards: Path, tmp_path: Path) -> None:
    """A restart from raw weights gave another number here: issue 20, fault 2."""
    unbroken = fit(shards, slow(), steps=4)
    fit(shards, slow(), tmp_path)
    resumed = slow()
    assert fit(shards, resumed, tmp_path, steps=4, ckpt_path="last") == unbroken
    assert resumed.updates == 4
    validated = trainer(slow()).validate(
        task(1), data(shards), ckpt_path=tmp_path / "last.ckpt", weights_only=True, verbose=False
    )
    assert validated[0]["val_ema/loss"] == unbroken != validated[0]["val/loss"]


def test_another_task_starts_another_average(shards: Path, tmp_path: Path) -> None:
    used = slow()
    fit(shards, used)
    assert fit(shards, used) == fit(shards, slow())
    assert used.updates == 2


def test_a_checkpoint_with_the_counter_alone_is_refused(shards: Path, tmp_path: Path) -> None:
    """As versions before this one wrote it."""
    fit(shards, slow(), tmp_path)
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    content["callbacks"]["EMA"] = {"updates": 2}
    torch.save(content, tmp_path / "old.ckpt")
    with refused(str(tmp_path)):
        fit(shards, slow(), steps=4, ckpt_path=tmp_path / "old.ckpt")


def test_a_module_that_is_no_task_is_refused(shards: Path) -> None:
    with refused("trainer.callbacks"):
        trainer(slow()).fit(Probe(), data(shards))
