"""Several loggers at once: scalars in all, images in those that can show them."""

from __future__ import annotations

import csv
import importlib.util
import io
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mhla_lightning.callbacks import SampleClips, SampleGrids
from mhla_lightning.config.recipes import apply_overrides, load_recipe
from mhla_lightning.config.resolve import resolve
from mhla_lightning.runs import pictures
from mhla_lightning.runs.folder import RunFolder, read_metrics
from mhla_lightning.runs.tags import HEATMAPS
from mhla_lightning.training.launch import RunOptions, launch
from tests.helpers.errors import refused
from tests.helpers.recording_logger import RecordingLogger

CLIP = np.arange(4 * 8 * 8 * 3, dtype=np.uint8).reshape(4, 8, 8, 3)


def shown_in_tensorboard(folder: Path, tag: str) -> list[np.ndarray]:
    events = EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    found = events.Images(tag)
    return [np.asarray(Image.open(io.BytesIO(event.encoded_image_string)).convert("RGB")) for event in found]


def test_a_run_with_three_loggers(
    recipe: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures._left_out.cache_clear()
    further: list[dict[str, Any]] = [
        {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "logs", "name": ""}},
        {"class_path": "tests.helpers.recording_logger.RecordingLogger"},
    ]
    given = {"trainer.max_steps": 2, "trainer.val_check_interval": 1}
    options = RunOptions(run_id="three")
    with caplog.at_level(logging.INFO, "mhla_lightning"):
        assert launch(str(recipe), given | {"trainer.logger": further}, options) == 0
    told = [record.message for record in caplog.records if "shows no images" in record.message]
    assert len(told) == 1
    assert "CSVLogger" in told[0]
    run, recorded = RunFolder(tmp_path / "runs" / "three"), RecordingLogger.made[-1]
    series = read_metrics(run.metrics)
    with Path("logs/version_0/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for tag in ("train/loss", "val/loss", "val_ema/loss"):
        expected = [value for _, value in series[tag]]
        assert recorded.scalars[tag] == pytest.approx(expected)
        assert [float(row[tag]) for row in rows if row[tag]] == pytest.approx(expected)
    assert [(tag, step) for tag, step, _ in recorded.images] == [(HEATMAPS, 1), (HEATMAPS, 2)]
    for mine, theirs in zip(
        [image for *_, image in recorded.images], shown_in_tensorboard(run.tensorboard, HEATMAPS), strict=True
    ):
        np.testing.assert_array_equal(mine, theirs)
    monkeypatch.setattr(RecordingLogger, "made", [])
    assert launch(str(recipe), given, options) == 0, "the loggers are no part of what the run is"
    assert not RecordingLogger.made


def test_grids_and_clips_go_to_every_logger_that_shows_images(tmp_path: Path) -> None:
    recorded, board = RecordingLogger(), TensorBoardLogger(tmp_path, "", "")
    loggers = [CSVLogger(tmp_path / "csv"), board, recorded]
    grids, clips = SampleGrids(per_class=1), SampleClips(prompts=["a bar"])
    grids._columns, clips._rows, clips._rate = 2, ["a bar"], 4.0
    grids.show(loggers, 3, torch.from_numpy(CLIP[:2]))
    clips.show(loggers, 5, [CLIP])
    board.experiment.flush()
    assert [(tag, step) for tag, step, _ in recorded.images] == [("samples", 3), ("samples/sheet", 5)]
    for tag, _, image in recorded.images:
        np.testing.assert_array_equal(image, shown_in_tensorboard(tmp_path, tag)[0])
    ((tag, step, gif, kind),) = recorded.videos
    assert (tag, step, kind, gif[:4]) == ("samples/clips", 5, "gif", b"GIF8")
    assert len(shown_in_tensorboard(tmp_path, "samples/clips")) == 1


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="it needs a missing package")
def test_a_logger_of_a_missing_package_is_one_sentence() -> None:
    wandb = {"class_path": "lightning.pytorch.loggers.WandbLogger", "init_args": {"offline": True}}
    values = load_recipe("classification/deit_tiny_mhla_mnist_cpu").values
    with refused("trainer.logger.0") as error:
        resolve(apply_overrides(values, {"trainer.logger": [wandb]}))
    assert "wandb" in (error.value.reason or "")


def test_wandb_takes_images_and_clips(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="wandb is no dependency of ours")
    logger = WandbLogger("test", str(tmp_path), offline=True)
    pictures.show_image([logger], "samples", CLIP[0], 1)
    pictures.show_gif([logger], "samples/clips", gif_of(CLIP), (8, 8), 1)
    logger.experiment.finish()
    assert {path.suffix for path in tmp_path.rglob("media/**/*.*")} == {".png", ".gif"}


def test_mlflow_takes_images_and_clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # mlflow 3.17 refuses folders without it
    pytest.importorskip("mlflow", reason="mlflow is no dependency of ours")
    logger = MLFlowLogger("test", tracking_uri=f"file:{tmp_path}")
    pictures.show_image([logger], "samples", CLIP[0], 1)
    pictures.show_gif([logger], "samples/clips", gif_of(CLIP), (8, 8), 1)
    assert {path.suffix for path in tmp_path.rglob("artifacts/images/*")} >= {".png", ".gif"}


def gif_of(clip: np.ndarray) -> bytes:
    frames, file = [Image.fromarray(frame) for frame in clip], io.BytesIO()
    frames[0].save(file, "gif", save_all=True, append_images=frames[1:])
    return file.getvalue()
