"""Callbacks of a run under a plain Trainer, without numbers that somebody hands them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset

from mhla_lightning.callbacks import Checkpoint, Health, ProgressFile, SampleGrids, SampleLog
from mhla_lightning.callbacks.default import default_callbacks
from mhla_lightning.data import ImageDataModule, ReadingConfig
from mhla_lightning.runs.folder import RunFolder, complete_checkpoints, read_lines, read_object
from mhla_lightning.tasks import ClassificationTask
from tests.helpers.errors import refused
from tests.helpers.recording_logger import RecordingLogger

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*", "ignore:.*does not have many workers.*")
QUIET: dict[str, Any] = dict.fromkeys(
    ("enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False
)
OPTIONS = {"img_size": 8, "patch_size": 2, "embed_dim": 12, "depth": 1, "num_heads": 2}


def task(**options: Any) -> ClassificationTask:
    return ClassificationTask("deit_tiny", {"name": "mhla", "blocks": 2}, OPTIONS, num_classes=4, **options)


def data(shards: Path) -> ImageDataModule:
    return ImageDataModule(str(shards), 16, 8, image_size=8, reading=ReadingConfig(num_workers=0))


def test_curves_heat_maps_and_progress_of_a_plain_trainer(shards: Path, tmp_path: Path) -> None:
    """Also the files of Health and SampleLog, in folders that nobody has made."""
    table, recorded = CSVLogger(tmp_path / "logs", name=""), RecordingLogger()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        accumulate_grad_batches=2,
        log_every_n_steps=1,
        logger=[table, recorded],
        callbacks=[Health(), SampleLog(), *default_callbacks()],
        default_root_dir=tmp_path / "a" / "b",
        **QUIET,
    )
    trainer.fit(task(), data(shards))
    curves = recorded.scalars
    assert len(curves["train/loss"]) == len(curves["train/grad_norm"]) == 4
    tokens = [speed * 16 for speed in curves["train/samples_per_second"]]
    assert curves["train/tokens_per_second"] == pytest.approx(tokens)
    assert [(tag, step) for tag, step, _ in recorded.images] == [("weights/mixing", 4)]
    progress = read_object(Path(table.log_dir, "progress.json"))
    assert (progress["state"], progress["step"], progress["max_steps"]) == ("finished", 4, 4)
    assert progress["consumed"] == 64
    assert len(read_lines(tmp_path / "a" / "b" / "samples" / "rank-0.jsonl")) == 8
    assert complete_checkpoints(Path(table.log_dir)) == []


class Foreign(pl.LightningModule):
    """Somebody's own module on pairs of tensors; its third step is not finite."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.layer(batch[0]).square().mean() * (float("nan") if batch_idx == 2 else 1.0)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_modules_and_batches_of_others(tmp_path: Path) -> None:
    pairs = TensorDataset(torch.randn(20, 4), torch.zeros(20))
    recorded = RecordingLogger()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        log_every_n_steps=1,
        logger=[CSVLogger(tmp_path), recorded],
        callbacks=[Health(), *default_callbacks()],
        **QUIET,
    )
    module = Foreign()
    trainer.fit(module, DataLoader(pairs, batch_size=4))
    assert "train/tokens_per_second" not in recorded.scalars
    assert recorded.scalars["train/skipped_steps"] == [0, 0, 1, 1, 1]
    seconds = [
        data + compute
        for data, compute in zip(
            recorded.scalars["train/time_data"], recorded.scalars["train/time_compute"], strict=True
        )
    ]
    assert recorded.scalars["train/samples_per_second"] == pytest.approx([4 / one for one in seconds])
    assert all(bool(weight.isfinite().all()) for weight in module.parameters())
    (report,) = Path(str(trainer.log_dir), "not_finite").iterdir()
    assert read_object(report)["batches"][0]["keys"][0] == "sample 0 of batch 2"
    assert read_object(Path(str(trainer.log_dir), "progress.json"))["step"] == 5


def test_a_second_training_starts_its_own_numbers(tmp_path: Path) -> None:
    progress = ProgressFile()
    for name in ("one", "two"):
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=2,
            logger=False,
            callbacks=progress,
            default_root_dir=tmp_path / name,
            **QUIET,
        )
        trainer.fit(Foreign(), DataLoader(TensorDataset(torch.randn(8, 4)), batch_size=4))
        assert read_object(tmp_path / name / "progress.json")["step"] == 2


def test_checkpoints_of_a_run_need_a_run(tmp_path: Path) -> None:
    """Before training, not at the first save."""
    checkpoint = Checkpoint(RunFolder(tmp_path), {}, dict)
    trainer = pl.Trainer(accelerator="cpu", logger=False, callbacks=checkpoint, max_steps=1)
    with refused("trainer.callbacks"):
        trainer.fit(Foreign(), DataLoader(TensorDataset(torch.randn(8, 4)), batch_size=4))
    assert not list(tmp_path.iterdir())


def test_drawing_needs_an_end_and_data_of_ours(shards: Path) -> None:
    trainer: Any = pl.Trainer(accelerator="cpu", logger=False, max_epochs=-1, **QUIET)
    trainer.datamodule = None
    with refused("trainer.max_steps"):
        SampleGrids().on_fit_start(trainer, task())
    trainer = pl.Trainer(accelerator="cpu", logger=False, max_steps=2, **QUIET)
    trainer.datamodule = None
    with refused("trainer.callbacks"):
        SampleGrids().on_fit_start(trainer, task())
