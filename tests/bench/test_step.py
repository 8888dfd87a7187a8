"""`mhla bench step`: both sides do the same work, and every moment has a source; never how fast it was."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from mhla_lightning.bench import step_speed
from mhla_lightning.bench.bare_loop import BareLoop
from mhla_lightning.bench.source_clock import SAME, SourceClock, source_of
from mhla_lightning.bench.step_speed import Feed, StepTimes, equal_losses, measure
from mhla_lightning.callbacks import EMA
from mhla_lightning.cli.main import main
from mhla_lightning.config.recipes import apply_overrides, load_recipe
from mhla_lightning.config.resolve import resolve
from mhla_lightning.errors import UserError

# Kind of task -> a small recipe of it, whose data is not there.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "classification": (
        "classification/deit_tiny_mhla_mnist_cpu",
        {"model.mixup": 0.8, "model.backbone_options.drop_path_rate": 0.5},
    ),
    "bf16": ("classification/deit_tiny_mhla_mnist_cpu", {"trainer.precision": "bf16-mixed"}),
    "language": ("language/lm_tiny_mhla_stdlib_cpu", {"model.eval_lengths": [64]}),
    "image diffusion": ("image_dit/dit_tiny_mhla_mnist_cpu", {}),
    "video diffusion": (
        "video_dit/wan_tiny_mhla_clips_cpu",
        {"model.backbone_options.input_size": [4, 16, 16]},
    ),
}


def small(family: str) -> Any:
    name, overrides = FAMILIES[family]
    small = {
        "model.backbone_options.depth": 1,
        "data.batch_size": 2,
        "data.path": "nowhere",
        "trainer.gradient_clip_val": 0.1,
    }
    return resolve(apply_overrides(load_recipe(name).values, small | overrides))


def test_both_sides_and_the_sources_of_the_difference_are_told(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "step.json"
    overrides = [
        "--data.micro_batch_size",
        "8",
        "--trainer.gradient_clip_val",
        "0.5",
        "--trainer.devices",
        "2",
    ]
    assert main(["bench", "step", str(recipe), "--steps", "2", *overrides, "--json", str(target)]) == 0
    result = json.loads(target.read_text())
    sides = {row["side"]: row for row in result["rows"]}
    assert list(sides) == ["lightning", "bare"]
    for row in sides.values():
        assert row["turns"] == 5
        assert 0 < row["fastest_seconds"] <= row["step_seconds"] <= row["slowest_seconds"]
        assert row["cpu_seconds"] > 0
        assert row["samples_per_second"] == pytest.approx(16 / row["step_seconds"])
    assert math.isfinite(result["loss"])
    assert (result["data"], result["parameters"], result["batch_size"]) == ("the recipe's own", 4824, 16)
    extra = {row["source"]: row["extra_seconds"] for row in result["breakdown"]}
    callbacks = {
        "Monitor",
        "Health",
        "Health: gradient norm",
        "ProgressFile",
        "Checkpoint",
        "projection",
        "average of the weights",
    }
    assert extra.keys() >= {*SAME, *callbacks}
    assert {"optimizer wrapper", "data hand-over", "logging", "loops and other hooks"} <= {
        name for name, seconds in extra.items() if seconds > 0
    }
    assert sum(extra.values()) == pytest.approx(
        result["extra_seconds"], abs=0.5 * sides["bare"]["step_seconds"]
    )  # medians; a turn's are exact, below
    assert result["summary"].keys() == {
        "lightning_over_bare",
        "lightning_over_bare_cpu",
        "lightning_own_over_bare",
    }
    assert result["summary"]["lightning_own_over_bare"] > 0
    assert "both sides end at loss" in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_both_sides_do_the_same_work(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = small(family)
    average = next(
        (callback for callback in recipe.trainer.get("callbacks", []) if isinstance(callback, EMA)), None
    )
    feeds: list[Feed] = []

    class Kept(Feed):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            feeds.append(self)

    monkeypatch.setattr(step_speed, "Feed", Kept)
    times = measure(recipe, tmp_path / "run", steps=1, turns=2, on_turn=lambda: None)
    (feed,) = feeds
    assert isinstance(feed.bare, BareLoop)
    assert len(feed.losses) == len(feed.bare.losses) == 3
    assert times.loss == float(feed.losses[-1]) == float(feed.bare.losses[-1])
    own, bare = feed.session.task.state_dict(), feed.bare.task.state_dict()
    assert own.keys() == bare.keys()
    assert all(torch.equal(own[name], bare[name]) for name in own)
    if average is not None:
        (kept,) = feed.bare.averages
        assert average.average.keys() == kept.average.keys()
        assert all(torch.equal(average.average[name], kept.average[name]) for name in kept.average)
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


class Sleeper(pl.Callback):
    """A callback that costs too much."""

    def on_before_zero_grad(self, *_: Any) -> None:
        time.sleep(0.02)


def test_a_slow_callback_is_found(recipe: Path, tmp_path: Path) -> None:
    resolved = resolve(load_recipe(str(recipe)).values)
    resolved.trainer["callbacks"].append(Sleeper())
    times = measure(resolved, tmp_path / "run", steps=1, turns=3, on_turn=lambda: None)
    rows = {row["source"]: row for row in times.breakdown()}
    assert rows["Sleeper"]["extra_seconds"] >= 0.02
    assert rows["Sleeper"]["bare_seconds"] == 0
    assert times.extra_seconds > 0.02
    for turn in (*times.lightning, *times.bare):
        assert all(seconds >= 0 for seconds in turn.values())


def test_the_clock_gives_every_moment_to_one_source(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = SourceClock()

    def wait(seconds: float) -> None:
        now[0] += seconds

    wait(100)
    clock.resume()
    wait(1)
    with clock.profile("[LightningModule]Task.optimizer_step"):
        wait(2)
        with clock.profile("[Strategy]SingleDeviceStrategy.backward"):
            wait(4)
            with clock.profile("[Callback]Monitor.on_before_backward"):
                wait(8)
        wait(16)
    wait(32)
    clock.pause()
    assert 0 <= clock.cpu_seconds < 1
    wait(100)
    clock.resume()
    wait(64)
    clock.pause()
    assert clock.take() == {"loops and other hooks": 97, "optimizer wrapper": 18, "backward": 4, "Monitor": 8}
    assert clock.take() == {}


def test_steps_on_cuda_are_timed_by_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's clock would also count what it waits for after the last kernel."""
    marks: list[int] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            marks.append(len(marks))
            self.at = len(marks)

        def elapsed_time(self, other: Event) -> float:
            return 250.0 * (other.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    clock = SourceClock()
    clock.device = torch.device("cuda")
    for _ in range(2):
        clock.resume()
        clock.pause()
    assert clock.event_seconds == 0.5
    clock.take()
    assert clock.event_seconds == 0
    host = [{"backward": 8.0}, {"backward": 8.0}]
    cpu = [(1.0, 1.0)] * 2
    device = torch.device("cuda")
    times = StepTimes(1, 8, 0.0, host, host, cpu, device, [(3.0, 2.0), (5.0, 4.0)])
    assert [row["step_seconds"] for row in times.rows()] == [4.0, 3.0]
    assert times.ratios == [1.5, 1.25]
    assert times.extra_seconds == 1.0


@pytest.mark.parametrize(
    ("action", "source"),
    [
        ("[Callback]ModelCheckpoint{'monitor': None}.on_train_batch_end", "ModelCheckpoint"),
        ("[Callback]EMA.on_train_batch_end", "average of the weights"),
        ("[Callback]EMA.on_before_backward", "EMA"),
        ("[LightningModule]DiffusionTask.on_train_batch_end", "hooks of the task"),
        ("[Strategy]SingleDeviceStrategy.batch_to_device", "data hand-over"),
        ("run_training_batch", "loops and other hooks"),
    ],
    ids=lambda value: value.split("]")[-1],
)
def test_actions_have_sources(action: str, source: str) -> None:
    assert source_of(action) == source


def test_medians_and_ratios_are_taken_turn_by_turn() -> None:
    lightning = [
        {"backward": 2.0, "Monitor": 0.5},
        {"backward": 4.0, "Monitor": 0.1},
        {"backward": 8.0, "Monitor": 0.2},
    ]
    times = StepTimes(
        1,
        8,
        0.0,
        lightning,
        [{"backward": 2.0}, {"backward": 4.0}, {"backward": 16.0}],
        [(3.0, 2.0), (3.0, 3.0), (3.0, 3.0)],
    )
    ratios = {
        "lightning_over_bare": 4.1 / 4,
        "lightning_over_bare_cpu": 1.0,
        "lightning_own_over_bare": 0.1 / 4,
    }
    assert times.summary() == pytest.approx(ratios)
    assert times.ratios == pytest.approx([1.25, 4.1 / 4, 8.2 / 16])
    assert [(row["source"], row["extra_seconds"]) for row in times.breakdown()] == [
        ("backward", 0.0),
        ("Monitor", 0.2),
    ]
    assert times.extra_seconds == pytest.approx(0.1)
    assert [row["samples_per_second"] for row in times.rows()] == pytest.approx([8 / 4.1, 2])


def test_other_losses_are_not_compared() -> None:
    losses = [torch.tensor(2.0), torch.tensor(1.0)]
    assert equal_losses(losses, losses, 0.0) == 1.0
    other = [torch.tensor(2.0), torch.tensor(1.0 + 1e-6)]
    assert equal_losses(losses, other, 1e-4) == 1.0
    with pytest.raises(
        UserError, match=r"the loss of micro batch 1 is 1.0 under Lightning and 1\.00000\d+ in the bare loop"
    ):
        equal_losses(losses, other, 0.0)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--trainer.strategy", "ddp"], "trainer.strategy"),
        (
            ["--trainer.precision", "16-mixed"],
            "trainer.precision",
        ),
        (["--turns", "2"], "--turns"),
        (["--model.num_classes", "7"], "num_classes"),
        (["stray"], "unexpected argument 'stray'"),
    ],
    ids=["strategy", "precision", "turns", "classes", "no option"],
)
def test_a_mistake_is_one_sentence(
    arguments: list[str], sentence: str, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "step", str(recipe), *arguments]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


def test_other_subjects_take_no_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "decode", "--trainer.max_steps", "3"]) == 2
    assert "--trainer.max_steps" in capsys.readouterr().err
