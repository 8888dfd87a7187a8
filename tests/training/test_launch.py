"""`launch`: the whole of a run, called from Python."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mhla_lightning.runs.folder import RunFolder, runs_root
from mhla_lightning.training.launch import RunOptions, launch
from tests.helpers.errors import refused


class Recorder:
    """Keeps everything that a run reports."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.problems: list[str] = []
        self.last: dict[str, float] = {}

    def line(self, text: str) -> None:
        self.lines.append(text)

    def problem(self, text: str) -> None:
        self.problems.append(text)

    def metrics(self, title: str, last: Mapping[str, float], best: Mapping[str, float] | None = None) -> None:
        self.last = dict(last)


def test_a_run_from_python(recipe: Path) -> None:
    overrides, options, report = {"trainer.max_steps": 4}, RunOptions(run_id="mine"), Recorder()
    assert launch(str(recipe), overrides, options, report) == 0
    assert RunFolder(runs_root() / "mine").finished()
    assert report.lines[0] == "run mine: 4 steps of 16"
    assert {"val/loss", "val/top1"} <= report.last.keys()
    again = Recorder()
    assert launch(str(recipe), overrides, options, again) == 0
    assert again.lines[0].startswith("run mine is finished")
    assert again.last == report.last
    evaluated = Recorder()
    assert launch(str(recipe), overrides, RunOptions(run_id="mine", mode="validate"), evaluated) == 0
    assert evaluated.last["val/loss"] == report.last["val/loss"]
    assert report.problems == again.problems == evaluated.problems == []


def test_mistakes_have_the_names_of_the_arguments(recipe: Path) -> None:
    with refused("ckpt"):
        RunOptions(ckpt="mine")
    with refused("run_id"):
        launch(str(recipe), options=RunOptions(run_id="../mine"))
    with refused("ckpt"):
        launch(str(recipe), options=RunOptions(mode="validate", ckpt="nothing"))
    with refused("recipe"):
        launch("nothing")
    with refused("trainer.max_step"):
        launch(str(recipe), {"trainer.max_step": 4})
