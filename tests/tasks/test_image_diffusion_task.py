"""The image diffusion task: whose randomness a sample has, what it learns from, which data it refuses;
whole runs on real image shards.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from mhla_lightning.callbacks.sample_grids import grid_steps
from mhla_lightning.cli.main import main
from mhla_lightning.runs.folder import complete_checkpoints, newest_checkpoint, read_metrics
from mhla_lightning.tasks import ImageDiffusionLossConfig, ImageDiffusionTask
from tests.helpers.diffusion_models import MHLA, OPTIONS, make_batch, make_task, train, write_recipe
from tests.helpers.errors import refused
from tests.helpers.killed_runs import exact_metrics, fit, fit_killed
from tests.helpers.ranks import Nursery

FACTS: dict[str, Any] = {"kind": "images", "classes": 4, "image_size": (8, 8)}
GRIDS = (
    "{class_path: mhla_lightning.callbacks.SampleGrids, init_args: {grids: 3, first: 2, classes: [0, 3], "
    "per_class: 2, sampler: ddpm, steps: 3}}"
)
EMA = "{class_path: mhla_lightning.callbacks.EMA, init_args: {decay: 0.9}}"
ALL = f"[{EMA}, {GRIDS}, {{class_path: mhla_lightning.callbacks.SampleLog}}]"


@pytest.fixture
def diffusion_recipe(tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MHLA_RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)
    return write_recipe(tmp_path / "tiny.yaml", shards)


@pytest.mark.parametrize("diffusion", ["ddpm", "flow"])
def test_a_sample_has_its_own_randomness(diffusion: str) -> None:
    """The losses of a batch are those of its halves: noise, time and dropped label do not depend on the
    company.
    """
    task = make_task(diffusion=diffusion, label_dropout=0.5)
    whole = make_batch(6)
    halves = [{key: value[part] for key, value in whole.items()} for part in (slice(0, 2), slice(2, 6))]
    together = task._losses(whole, [0] * 6, "diffusion", 0.5)[0]["loss"]
    apart = torch.cat(
        [task._losses(half, [0] * len(half["key"]), "diffusion", 0.5)[0]["loss"] for half in halves]
    )
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-6)
    again = task._losses(whole, [1] * 6, "diffusion", 0.5)[0]["loss"]
    assert not torch.isclose(together, again).any(), "another epoch draws anew"


def test_labels_are_dropped_in_the_share_asked_for() -> None:
    task = make_task(label_dropout=0.25)
    dropped = task._draws("diffusion", 0.25)((1,), [0] * 4000, range(4000))[2]
    assert abs(dropped.float().mean().item() - 0.25) < 0.025  # 3.6 standard deviations
    assert not task._draws("diffusion", 0.0)((1,), [0] * 100, range(100))[2].any()


def test_a_dropped_label_is_the_null_label() -> None:
    """With every label dropped the class of a sample changes nothing; with none it does."""
    task, batch = make_task(), make_batch()
    other = {**batch, "label": (batch["label"] + 1) % 4}
    dropped = [task._losses(b, [0] * 6, "diffusion", 1.0)[0]["loss"] for b in (batch, other)]
    kept = [task._losses(b, [0] * 6, "diffusion", 0.0)[0]["loss"] for b in (batch, other)]
    assert torch.equal(*dropped)
    assert not torch.isclose(*kept).any()


def test_validation_meets_the_same_noise_every_time_and_leaves_padding_out() -> None:
    task, batch = make_task(), make_batch(6)
    padded = {**batch, "weight": torch.tensor([1.0, 1, 1, 1, 0, 0])}
    short = {key: value[:4] for key, value in batch.items()}
    task.log = lambda *args, **kwargs: None
    values = []
    for given in (padded, short, padded):
        task.evaluate(given, "val")
        values.append({name: float(task.metrics["val"][name].compute()) for name in ("loss", "mse", "vb")})
        for metric in task.metrics["val"].values():
            metric.reset()
    assert values[0] == values[2]
    assert values[0]["loss"] == pytest.approx(values[1]["loss"], rel=1e-5)


def test_losses_by_time_make_up_the_loss() -> None:
    task, batch = make_task(time_bins=3), make_batch(6)
    with torch.no_grad():
        losses, times = task._losses(batch, [0] * 6, "diffusion", 0.0)
    task._count("train", losses["loss"], times)
    sums, counts = task._by_time["train"]
    assert counts.sum() == 6
    assert float(sums.sum()) == pytest.approx(float(losses["loss"].sum()), rel=1e-5)
    expected = torch.bincount((times / 1000 * 3).long().clamp_max(2), minlength=3)
    assert counts.tolist() == expected.tolist()


@pytest.mark.filterwarnings(
    "ignore:The 'val_dataloader' does not have many workers"
)  # one batch in memory needs none
def test_a_part_of_the_time_axis_that_no_sample_meets_is_not_logged() -> None:
    """It was NaN in TensorBoard and in metrics.jsonl. Padding, weight 0, is no sample either; the next
    validation begins anew.
    """
    task, batch = make_task(time_bins=40), make_batch(6) | {"weight": torch.tensor([1.0, 1, 1, 1, 0, 0])}
    bins = task.process.bins(task._draws("validation", 0.0)((1,), [0] * 6, range(6))[1], 40)
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batches: Any = [batch]
    for _ in range(2):
        (found,) = trainer.validate(task, DataLoader(batches, batch_size=None), verbose=False)
        parts = {tag: value for tag, value in found.items() if tag.startswith("loss_by_time/")}
        assert parts.keys() == {f"loss_by_time/val_{number + 1}of40" for number in bins[:4].tolist()}
        shares = torch.bincount(bins[:4], minlength=40) / 4
        total = sum(
            float(shares[number]) * parts[f"loss_by_time/val_{number + 1}of40"]
            for number in set(bins[:4].tolist())
        )
        assert total == pytest.approx(found["val/loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"backbone_options": OPTIONS | {"num_classes": 0}}, "backbone_options.num_classes"),
        ({"diffusion": "ddmp"}, "diffusion.name"),
        ({"diffusion": {"name": "flow", "shfit": 3}}, "diffusion.shfit"),
        ({"backbone": "deit_tiny", "backbone_options": {}}, "backbone"),
        ({"backbone": "dit_z2"}, "backbone"),
        ({"backbone_options": {"input_size": 9}}, "backbone_options.input_size"),
        ({"backbone_options": {"inputsize": 8}}, "backbone_options.inputsize"),
    ],
)
def test_wrong_options(options: dict[str, Any], key: str) -> None:
    with refused(key):
        ImageDiffusionTask(
            **{"backbone": "dit_s2", "attention": MHLA, "backbone_options": OPTIONS, **options}
        )


@pytest.mark.parametrize(
    ("options", "key"),
    [({"label_dropout": 1.5}, "loss.label_dropout"), ({"time_bins": 0}, "loss.time_bins")],
)
def test_wrong_losses(options: dict[str, Any], key: str) -> None:
    with refused(key):
        ImageDiffusionLossConfig(**options)


@pytest.mark.parametrize(
    ("facts", "key"),
    [
        ({"kind": "tokens", "length": 4}, None),
        (FACTS | {"image_size": (16, 16)}, "backbone_options.input_size"),
        (FACTS | {"classes": 10}, "backbone_options.num_classes"),
    ],
)
def test_data_that_does_not_fit(facts: dict[str, Any], key: str | None) -> None:
    task = make_task()
    task.check_data(FACTS, 4)
    with refused(key):
        task.check_data(facts, 4)


def test_a_run_learns_and_shows_what_it_draws(diffusion_recipe: Path, tmp_path: Path) -> None:
    """Loss, its share by time and a grid of samples at log-spaced steps stand in TensorBoard's own files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(
        diffusion_recipe,
        "one",
        "--trainer.callbacks",
        ALL,
        "--trainer.max_steps",
        "40",
        "--trainer.val_check_interval",
        "20",
    )
    run = tmp_path / "runs" / "one"
    series = read_metrics(run / "metrics.jsonl")
    assert {
        "val/loss",
        "val/mse",
        "val/vb",
        "val_ema/loss",
        "loss_by_time/train_1of4",
        "loss_by_time/val_4of4",
    } <= series.keys()
    assert series["val/loss"][-1][1] < 0.7 * series["train/loss"][0][1]
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    images = events.Images("samples")
    assert [image.step for image in images] == sorted(grid_steps(2, 40, 3)) == [2, 9, 40]
    assert (images[0].width, images[0].height) == (2 * 9 + 1, 2 * 9 + 1), (
        "two classes side by side, two rows, 8 pixels and a border each"
    )


@pytest.mark.slow
def test_grids_change_nothing_in_training(diffusion_recipe: Path, tmp_path: Path) -> None:
    train(diffusion_recipe, "with", "--trainer.callbacks", ALL)
    train(diffusion_recipe, "without")
    checkpoints = [newest_checkpoint(tmp_path / "runs" / name) for name in ("with", "without")]
    states = [torch.load(c / "trainer.ckpt", weights_only=True)["state_dict"] for c in checkpoints if c]
    assert len(states) == 2
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.slow
def test_accumulation_and_ranks_take_the_same_step(
    nursery: Nursery, diffusion_recipe: Path, tmp_path: Path
) -> None:
    """One process with 16 samples at once, and two with 4: noise belongs to the sample."""
    fit(nursery, diffusion_recipe, tmp_path / "runs" / "whole", "--trainer.max_steps", "3")
    fit(
        nursery,
        diffusion_recipe,
        tmp_path / "runs" / "split",
        "--trainer.max_steps",
        "3",
        "--trainer.devices",
        "2",
        "--data.micro_batch_size",
        "4",
    )
    whole, split = (
        dict(read_metrics(tmp_path / "runs" / name / "metrics.jsonl")["train/loss"])
        for name in ("whole", "split")
    )
    assert whole.keys() == split.keys() == {1, 2, 3}
    for step, loss in whole.items():
        assert split[step] == pytest.approx(loss, rel=1e-4)


@pytest.mark.slow
def test_killed_and_resumed_bit_for_bit(nursery: Nursery, diffusion_recipe: Path, tmp_path: Path) -> None:
    """Checkpoints lie between the points of the curves, and once on one of them."""
    extra = [
        "--trainer.callbacks",
        ALL,
        "--trainer.max_steps",
        "40",
        "--trainer.val_check_interval",
        "10",
        "--checkpoint.every_n_steps",
        "3",
    ]
    extra += ["--trainer.log_every_n_steps", "4"]
    whole, cut = tmp_path / "runs" / "whole", tmp_path / "runs" / "cut"
    fit(nursery, diffusion_recipe, whole, *extra)
    assert fit_killed(nursery, diffusion_recipe, cut, 17, *extra), "the run ended before it could be killed"
    fit(nursery, diffusion_recipe, cut, *extra)
    assert exact_metrics(whole) == exact_metrics(cut)


def test_a_loss_that_is_no_number_stops_the_run(
    diffusion_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoint before it stays the newest, and the samples of the batch are named."""
    shaken = [
        "--model.optimizer.lr",
        "1e20",
        "--model.schedule.name",
        "constant",
        "--model.schedule.warmup_steps",
        "5",
    ]
    shaken += [
        "--model.schedule.warmup_lr",
        "1e-9",
        "--checkpoint.every_n_steps",
        "2",
        "--trainer.log_every_n_steps",
        "3",
    ]
    shaken += ["--health.max_skipped", "2"]
    assert main(["run", str(diffusion_recipe), "--run-id", "nan", *shaken]) == 2
    said = capsys.readouterr().err
    assert "is not finite" in said
    assert "Traceback" not in said
    run = tmp_path / "runs" / "nan"
    for checkpoint in complete_checkpoints(run):
        state = torch.load(checkpoint / "trainer.ckpt", weights_only=True)["state_dict"]
        assert all(bool(value.isfinite().all()) for value in state.values())
    reports = sorted((run / "not_finite").glob("step-*-rank-0.json"))
    assert len(reports) == 3
    batches = json.loads(reports[0].read_text())["batches"]
    assert len(batches[0]["keys"]) == 16
    assert json.loads((run / "progress.json").read_text())["state"] == "failed"


def test_steps_of_the_grids() -> None:
    assert grid_steps(100, 10_000, 3) == {100, 1000, 10_000}
    assert grid_steps(100, 50, 4) == {50}
    assert grid_steps(10, 1000, 1) == {1000}
    assert max(grid_steps(7, 12345, 9)) == 12345


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"sampler": "euler"}, "euler"),
        ({"classes": [0, 4]}, "SampleGrids.classes: 4"),
        ({"grids": 0}, "grids: 0"),
    ],
)
def test_wrong_grids_are_refused_before_training(
    diffusion_recipe: Path, options: dict[str, Any], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    callbacks = json.dumps([{"class_path": "mhla_lightning.callbacks.SampleGrids", "init_args": options}])
    assert main(["run", str(diffusion_recipe), "--run-id", "bad", "--trainer.callbacks", callbacks]) == 2
    assert says in capsys.readouterr().err


def test_noise_is_standard_normal_and_times_cover_the_axis() -> None:
    task = make_task()
    noise, times, _ = task._draws("diffusion", 0.0)((3, 8, 8), [0] * 500, range(500))
    assert abs(float(noise.mean())) < 0.02
    assert abs(float(noise.std()) - 1) < 0.02
    assert np.histogram(times.numpy(), 4, (0, 1000))[0].min() > 90
