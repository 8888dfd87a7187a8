"""Whole runs of the video diffusion task on real clips: learning, a kill, ranks, a teacher, an export,
buckets of images and videos.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mhla_lightning.cli.main import main
from mhla_lightning.data.index import Clip
from mhla_lightning.data.prepare.clips.make import make_clips
from mhla_lightning.data.prepare.clips.options import ClipOptions
from mhla_lightning.runs.folder import newest_checkpoint, read_metrics
from tests.helpers.diffusion_models import train
from tests.helpers.killed_runs import exact_metrics, fit, fit_killed
from tests.helpers.ranks import Nursery
from tests.helpers.video_runs import CAPTIONS, FRAMES, RATE, SIDE, write_clips, write_recipe

CLIPS = json.dumps(
    [
        {"class_path": "mhla_lightning.callbacks.EMA", "init_args": {"decay": 0.9}},
        {
            "class_path": "mhla_lightning.callbacks.SampleClips",
            "init_args": {"sheets": 2, "first": 5, "steps": 2, "prompts": list(CAPTIONS)},
        },
        {"class_path": "mhla_lightning.callbacks.SampleLog"},
    ]
)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clips(tmp_path_factory.mktemp("clips"))


@pytest.fixture
def video_recipe(tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MHLA_RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)
    return write_recipe(tmp_path / "tiny.yaml", shards)


@pytest.mark.slow
def test_a_run_learns(video_recipe: Path, tmp_path: Path) -> None:
    learn = ["--model.optimizer.lr", "1e-2", "--model.backbone_options.patch_size", "[2, 2, 2]"]
    train(
        video_recipe,
        "one",
        *learn,
        "--trainer.max_steps",
        "120",
        "--trainer.val_check_interval",
        "60",
        "--checkpoint.every_n_steps",
        "60",
    )
    series = read_metrics(tmp_path / "runs" / "one" / "metrics.jsonl")
    assert {"val/loss", "val_ema/loss", "loss_by_time/train_1of4"} <= series.keys()
    assert any(tag.startswith("loss_by_time/val_") for tag in series), (
        "a part of the time axis that met no clip is not logged, the others are"
    )
    assert series["val/loss"][-1][1] < 0.6 * series["train/loss"][0][1]


@pytest.mark.slow
def test_killed_and_resumed_bit_for_bit(nursery: Nursery, video_recipe: Path, tmp_path: Path) -> None:
    extra = [
        "--trainer.callbacks",
        CLIPS,
        "--trainer.max_steps",
        "24",
        "--trainer.val_check_interval",
        "8",
        "--checkpoint.every_n_steps",
        "3",
    ]
    extra += [
        "--trainer.log_every_n_steps",
        "4",
        "--model.time_bins",
        "40",
    ]  # more than a point of the curves has samples
    whole, cut = tmp_path / "runs" / "whole", tmp_path / "runs" / "cut"
    fit(nursery, video_recipe, whole, *extra)
    assert fit_killed(nursery, video_recipe, cut, 11, *extra), "the run ended before it could be killed"
    fit(nursery, video_recipe, cut, *extra)
    assert exact_metrics(whole) == exact_metrics(cut)
    parts = {
        tag: values
        for tag, values in read_metrics(whole / "metrics.jsonl").items()
        if tag.startswith("loss_by_time/train_")
    }
    assert all(len({value for _, value in values}) == len(values) for values in parts.values()), (
        "a part that no sample met is not logged again"
    )


@pytest.mark.slow
def test_accumulation_and_ranks_take_the_same_step(
    nursery: Nursery, video_recipe: Path, tmp_path: Path
) -> None:
    """One process with 4 clips at once, and two with 1: noise, time and dropped text belong to the sample."""
    fit(nursery, video_recipe, tmp_path / "runs" / "whole", "--trainer.max_steps", "3")
    fit(
        nursery,
        video_recipe,
        tmp_path / "runs" / "split",
        "--trainer.max_steps",
        "3",
        "--trainer.devices",
        "2",
        "--data.micro_batch_size",
        "1",
    )
    whole, split = (read_metrics(tmp_path / "runs" / name / "metrics.jsonl") for name in ("whole", "split"))
    assert [step for step, _ in whole["train/loss"]] == [1, 2, 3]
    tags = {tag for tag in whole if tag == "train/loss" or tag.startswith("loss_by_time/")}
    assert len(tags) > 4
    for tag in tags:
        assert [step for step, _ in split[tag]] == [step for step, _ in whole[tag]], tag
        assert [value for _, value in split[tag]] == pytest.approx(
            [value for _, value in whole[tag]], rel=1e-4, nan_ok=True
        ), tag


@pytest.mark.slow
def test_a_run_is_the_teacher_of_the_next(video_recipe: Path, tmp_path: Path) -> None:
    train(video_recipe, "teacher", "--model.attention", "softmax")
    told = ["--model.distill.teacher", str(tmp_path / "runs" / "teacher"), "--model.distill.output", "0.5"]
    train(video_recipe, "student", *told, "--trainer.max_steps", "8", "--trainer.val_check_interval", "8")
    assert main(["export", "teacher", "--to", str(tmp_path / "folder")]) == 0
    again = [
        "--model.distill.teacher",
        str(tmp_path / "folder"),
        *told[2:],
        "--model.init_from",
        str(tmp_path / "folder"),
    ]
    train(video_recipe, "of-a-folder", *again)
    series = read_metrics(tmp_path / "runs" / "student" / "metrics.jsonl")
    assert series["train/distill_layers"][-1][1] < series["train/distill_layers"][0][1]
    checkpoint = newest_checkpoint(tmp_path / "runs" / "student")
    assert checkpoint is not None
    assert not any(
        "teacher" in name for name in torch.load(checkpoint / "trainer.ckpt", weights_only=True)["state_dict"]
    )
    assert main(["sample", "student", "--prompt", CAPTIONS[0], "--steps", "2"]) == 0, (
        "a student draws without its teacher"
    )


def test_a_teacher_that_is_not_there_is_named(video_recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(video_recipe), "--run-id", "lost", "--model.distill.teacher", "nowhere"]) == 2
    assert "--model.loss.distill.teacher: nowhere" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_is_exported_and_imported_bit_equal(video_recipe: Path, tmp_path: Path) -> None:
    train(video_recipe, "one")
    assert main(["export", "one", "--to", str(tmp_path / "out"), "--format", "wan"]) == 0
    assert main(["import", "wan", str(tmp_path / "out"), "--out", str(tmp_path / "back.safetensors")]) == 0
    checkpoint = newest_checkpoint(tmp_path / "runs" / "one")
    assert checkpoint is not None
    average, back = (
        load_file(checkpoint / "ema" / "weights.safetensors"),
        load_file(tmp_path / "back.safetensors"),
    )
    assert average.keys() == back.keys()
    assert all(torch.equal(value, back[name]) for name, value in average.items())


@pytest.mark.slow
def test_images_and_videos_in_one_run(video_recipe: Path, shards: Path, tmp_path: Path) -> None:
    """Images are clips of one frame; a step takes one of the two, and blocks of videos take both."""
    image = ClipOptions((Clip(1, SIDE, SIDE, RATE),), stride=2, val_by="time", store="npy")
    make_clips(shards.parent / "films", tmp_path / "images", image)
    mix = json.dumps([{"path": str(shards)}, {"path": str(tmp_path / "images")}])
    both = [
        "--data.path",
        "null",
        "--data.mix",
        mix,
        "--data.mix_by",
        "batch",
        "--model.backbone_options.patch_size",
        "[1, 4, 4]",
    ]
    train(
        video_recipe,
        "both",
        *both,
        "--trainer.callbacks",
        CLIPS,
        "--trainer.max_steps",
        "12",
        "--trainer.val_check_interval",
        "12",
    )
    series = read_metrics(tmp_path / "runs" / "both" / "metrics.jsonl")
    consumed = {tag: points[-1][1] for tag, points in series.items() if tag.startswith("train/consumed/")}
    assert sum(consumed.values()) == 12 * 4
    assert all(0 < count < 48 and count % 4 == 0 for count in consumed.values())
    assert len(consumed) == 2
    drawn = [
        "sample",
        "both",
        "--prompt",
        CAPTIONS[0],
        "--steps",
        "2",
        "--frames",
        "1",
        "--size",
        f"{SIDE}x{2 * SIDE}",
    ]
    assert main(drawn) == 0
    assert FRAMES > 1


@pytest.mark.slow
def test_data_that_the_layout_cannot_take_is_named_before_training(
    video_recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(
            ["run", str(video_recipe), "--run-id", "bad", "--model.backbone_options.patch_size", "[3, 4, 4]"]
        )
        == 2
    )
    said = capsys.readouterr().err
    assert "8" in said
    assert "patch" in said
    assert "Traceback" not in said
