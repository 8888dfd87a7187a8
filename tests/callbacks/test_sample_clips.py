"""SampleClips: what it draws into TensorBoard, and that training goes on as if it had not."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mhla_lightning.cli.main import main
from mhla_lightning.runs.folder import read_metrics
from tests.helpers.diffusion_models import train
from tests.helpers.video_runs import CAPTIONS, FRAMES, SIDE, write_clips, write_recipe

EMA = {"class_path": "mhla_lightning.callbacks.EMA", "init_args": {"decay": 0.9}}


def clips(**options: Any) -> dict[str, Any]:
    return {
        "class_path": "mhla_lightning.callbacks.SampleClips",
        "init_args": {"sheets": 2, "first": 2, "steps": 2, **options},
    }


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("clips")
    return write_recipe(root / "tiny.yaml", write_clips(root))


def images(run: Path) -> dict[str, list[Any]]:
    found = EventAccumulator(str(next(run.rglob("events.*")).parent), size_guidance={"images": 0})
    found.Reload()
    return {tag: found.Images(tag) for tag in found.Tags()["images"]}


def test_a_sheet_and_a_gif_at_the_steps_asked_for(recipe: Path, tmp_path: Path) -> None:
    chosen = json.dumps([EMA, clips(prompts=list(CAPTIONS), per_prompt=2)])
    train(recipe, "drawn", "--runs", str(tmp_path), "--trainer.callbacks", chosen)
    found = images(tmp_path / "drawn" / "tensorboard")
    assert [event.step for event in found["samples/sheet"]] == [2, 4]
    assert [event.step for event in found["samples/clips"]] == [2, 4]
    with Image.open(io.BytesIO(found["samples/clips"][0].encoded_image_string)) as moving:
        assert moving.format == "GIF"
        assert moving.n_frames == FRAMES  # type: ignore[attr-defined]
        assert moving.width == 4 * moving.height, "four square clips beside each other"
        assert moving.height % SIDE == 0
    sheets = [Image.open(io.BytesIO(event.encoded_image_string)) for event in found["samples/sheet"]]
    assert sheets[0].size == sheets[1].size
    assert not np.array_equal(np.asarray(sheets[0]), np.asarray(sheets[1])), "the model has moved on"


@pytest.mark.slow
def test_training_does_not_notice(recipe: Path, tmp_path: Path) -> None:
    for name, callbacks in (("without", [EMA]), ("with", [EMA, clips()])):
        train(recipe, name, "--runs", str(tmp_path), "--trainer.callbacks", json.dumps(callbacks))
    without, drawn = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("without", "with"))
    for tag in ("train/loss", "val/loss", "val_ema/loss"):
        assert drawn[tag] == without[tag]
    assert "samples/clips" in images(tmp_path / "with" / "tensorboard")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"sheets": 0}, "sheets: "),
        ({"prompts": []}, "prompts: "),
        ({"sampler": "ddpm"}, "ddpm"),
        ({"guidance": -1}, "-1"),
        ({"prompts": ["one two three four five six seven"]}, "prompts: "),
    ],
)
def test_wrong_options_are_refused_before_training(
    recipe: Path, tmp_path: Path, options: dict[str, Any], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = json.dumps([clips(**options)])
    assert (
        main(["run", str(recipe), "--run-id", "bad", "--runs", str(tmp_path), "--trainer.callbacks", chosen])
        == 2
    )
    assert named in capsys.readouterr().err
    assert not list(tmp_path.rglob("trainer.ckpt"))
