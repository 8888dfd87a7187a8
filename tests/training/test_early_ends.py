"""Runs that end before their last step: stopped and resumed, or ended by EarlyStopping."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mhla_lightning.callbacks.early_end import EarlyEnd, early_end
from mhla_lightning.cluster.slurm import Slurm
from mhla_lightning.cluster.status import status_rows
from mhla_lightning.runs.folder import RunFolder, complete_checkpoints, read_metrics
from mhla_lightning.training.launch import RunOptions, launch
from tests.helpers.errors import refused
from tests.helpers.images import TINY_RECIPE

STEPS = 12
EARLY = "lightning.pytorch.callbacks.EarlyStopping"
AVERAGE = {"class_path": "mhla_lightning.callbacks.EMA", "init_args": {"decay": 0.9}}


Curves = dict[str, list[tuple[int, float]]]


@pytest.fixture(scope="module")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Curves:
    """The curves of a run that nothing ends, with a validation after every step."""
    root = tmp_path_factory.mktemp("whole")
    (root / "tiny.yaml").write_text(TINY_RECIPE.replace("PATH", str(shards)))
    overrides = {"trainer.val_check_interval": 1}
    assert launch(str(root / "tiny.yaml"), overrides, RunOptions(str(root / "runs"), "whole")) == 0
    return exact(RunFolder(root / "runs" / "whole"))


def part(curves: Curves, end: int, interval: int, also: int = 0) -> Curves:
    """The curves until a step, with the points of the validations that are due, and of one more."""
    due = [step for step in range(1, end + 1) if step % interval == 0 or step == also]
    return {
        tag: [point for point in points if point[0] in (due if tag.startswith("val") else range(end + 1))]
        for tag, points in curves.items()
    }


def run(recipe: Path, name: str, **trainer: Any) -> int:
    overrides = {f"trainer.{key}": value for key, value in trainer.items()}
    return launch(str(recipe), overrides, RunOptions(run_id=name))


def folder(name: str) -> RunFolder:
    return RunFolder(Path("runs").resolve() / name)


def progress(name: str) -> dict[str, Any]:
    return dict(json.loads(folder(name).progress.read_text()))


def exact(of: RunFolder) -> Curves:
    """Every curve that does not measure time."""
    series = read_metrics(of.metrics)
    return {tag: values for tag, values in series.items() if "per_second" not in tag and "time_" not in tag}


def early_stopping(**options: Any) -> dict[str, Any]:
    return {"class_path": EARLY, "init_args": {"monitor": "val/loss", **options}}


def stop_at(step: int) -> dict[str, Any]:
    return {"class_path": "tests.helpers.stopping.StopAt", "init_args": {"step": step}}


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize(
    "micro", [16, pytest.param(8, marks=pytest.mark.slow)], ids=["whole batches", "accumulated"]
)
def test_max_time_stops_after_a_step_and_the_same_command_resumes(
    recipe: Path, whole: Curves, micro: int
) -> None:
    """A microsecond is over after the first step of each start: three starts for three steps."""
    words = ["run", str(recipe), "--data.micro_batch_size", str(micro), "--trainer.max_steps", "3"]
    timed = [*words, "--run-id", "timed", "--trainer.max_time", "{microseconds: 1}"]
    for step in (1, 2, 3):
        with subprocess.Popen(
            [sys.executable, "-m", "mhla_lightning", *timed],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as done:
            said, _ = done.communicate(timeout=240)
        assert done.returncode == (0 if step == 3 else 75), said
        found = progress("timed")
        assert (found["step"], found["consumed"]) == (step, 16 * step)
        assert folder("timed").finished() is (step == 3)
        if step < 3:
            assert "stopped by trainer.max_time, 1e-06 s of one start; the same command resumes" in said
            assert found["state"] == "preempted"
            assert found["reason"].startswith("trainer.max_time")
            (row,) = status_rows([folder("timed")], Slurm())
            assert (row["state"], row["reason"]) == ("STOPPED", found["reason"])
            assert complete_checkpoints(folder("timed").path)[-1].name == f"step-{step:08d}"
    found = exact(folder("timed"))
    assert [step for step, _ in found["train/loss"]] == [1, 2, 3]
    assert [step for step, _ in found["val/loss"]] == [3], "no validation more or less"
    if micro == 16:  # accumulated sums have other last bits
        assert found["train/loss"] == whole["train/loss"][:3]
    assert found["train/loss"] == [
        (step, pytest.approx(value, rel=1e-5)) for step, value in whole["train/loss"][:3]
    ]


def test_a_callback_that_stops_a_run_leaves_it_to_be_resumed(recipe: Path, whole: Curves) -> None:
    callbacks = [AVERAGE, stop_at(6)]
    assert run(recipe, "stopped", callbacks=callbacks) == 75
    found = progress("stopped")
    assert (found["state"], found["step"], found["consumed"]) == ("preempted", 6, 96)
    assert "trainer.should_stop" in found["reason"]
    assert not folder("stopped").summary.exists()
    assert run(recipe, "stopped", callbacks=callbacks) == 0
    assert folder("stopped").finished()
    assert progress("stopped")["reason"] is None
    # Lightning validates once more where it stops.
    assert exact(folder("stopped")) == part(whole, STEPS, 4, also=6)


def expected_end(values: list[tuple[int, float]], patience: int, least: int = 0) -> int:
    """The step at which a metric that should rise has not risen for `patience` validations."""
    best, waited, over = float("-inf"), 0, False
    for step, value in values:
        best, waited = (value, 0) if value > best else (best, waited + 1)
        over = over or waited >= patience
        if over and step >= least:
            return step
    raise AssertionError("it would not end")


@pytest.mark.parametrize(("interval", "least"), [(3, 0), (1, 5)], ids=["every 3", "min_steps"])
def test_early_stopping_ends_a_run_for_good(recipe: Path, whole: Curves, interval: int, least: int) -> None:
    """The loss falls, and the callback waits for it to rise: the end follows from the curve."""
    due = [point for point in whole["val/loss"] if point[0] % interval == 0]
    end = expected_end(due, patience=2, least=least)
    assert least <= end < STEPS
    callbacks = [AVERAGE, early_stopping(mode="max", patience=2)]
    asked: dict[str, Any] = {"callbacks": callbacks, "val_check_interval": interval, "min_steps": least}
    assert run(recipe, "early", **asked) == 0
    summary = json.loads(folder("early").summary.read_text())
    assert summary["steps"] == end
    assert summary["ended_early"].startswith("EarlyStopping: Monitored metric val/loss did not improve")
    found = progress("early")
    assert (found["state"], found["step"], found["max_steps"]) == ("finished", end, STEPS)
    assert found["reason"] == summary["ended_early"]
    (row,) = status_rows([folder("early")], Slurm())
    assert (row["state"], row["reason"]) == ("FINISHED", found["reason"])
    assert exact(folder("early")) == part(whole, end, interval)
    before = folder("early").metrics.read_bytes()
    assert run(recipe, "early", **asked) == 0
    assert folder("early").metrics.read_bytes() == before, "the same command trains no more"


@pytest.mark.slow
def test_early_stopping_counts_over_a_stop(recipe: Path, whole: Curves) -> None:
    """Two validations before the stop and one after it."""
    early = early_stopping(mode="max", patience=2)
    callbacks = [AVERAGE, early, stop_at(6)]
    codes = [run(recipe, "cut", val_check_interval=3, callbacks=callbacks) for _ in range(2)]
    assert codes == [75, 0]
    end = expected_end([point for point in whole["val/loss"] if point[0] % 3 == 0], patience=2)
    assert json.loads(folder("cut").summary.read_text())["steps"] == end == 9
    assert exact(folder("cut")) == part(whole, end, 3)


def test_early_stopping_on_an_unknown_metric_names_the_known_ones(recipe: Path) -> None:
    with refused("trainer.callbacks") as error:
        run(recipe, "r", callbacks=[early_stopping(monitor="val/lss")])
    assert "val/loss" in error.value.reason
    assert not folder("r").finished()


def test_early_stopping_on_a_metric_that_is_not_finite_is_no_finished_run() -> None:
    from types import SimpleNamespace

    import torch
    from lightning.pytorch.callbacks import EarlyStopping

    callback = EarlyStopping("val/loss")
    trainer: Any = SimpleNamespace(
        callbacks=[callback],
        callback_metrics={"val/loss": torch.tensor(float("nan"))},
        fast_dev_run=False,
        should_stop=False,
        current_epoch=0,
        global_step=4,
        sanity_checking=False,
        state=SimpleNamespace(fn="fit"),
        strategy=SimpleNamespace(reduce_boolean_decision=lambda stop, all: stop),
    )
    assert early_end(trainer) is None
    callback.on_validation_end(trainer, None)  # type: ignore[arg-type]
    assert trainer.should_stop
    with refused(None) as error:
        early_end(trainer)
    assert "step 4" in error.value.reason


@pytest.mark.parametrize(("patience", "ends"), [(3, True), (4, False)], ids=["same", "longer"])
def test_the_recipe_gives_the_patience_of_a_resumed_run(patience: int, ends: bool) -> None:
    """A checkpoint from the end of a run with patience 3: only a longer one trains on."""
    from types import SimpleNamespace

    from lightning.pytorch.callbacks import EarlyStopping
    from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason

    old = EarlyStopping("val/loss", patience=3)
    old.wait_count, old.stopping_reason = 3, EarlyStoppingReason.PATIENCE_EXHAUSTED
    callback = EarlyStopping("val/loss", patience=patience)
    trainer: Any = SimpleNamespace(callbacks=[callback], should_stop=False)
    watch: Any = EarlyEnd()
    watch.setup(trainer, None, "fit")
    callback.load_state_dict(old.state_dict())
    watch.on_train_start(trainer, None)
    assert (callback.patience, trainer.should_stop) == (patience, ends)
    assert (early_end(trainer) is not None) is ends


def test_a_run_is_not_shorter_than_its_least_steps(recipe: Path) -> None:
    with refused("trainer.min_steps"):
        run(recipe, "r", min_steps=STEPS + 1)
