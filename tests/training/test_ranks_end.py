"""A rank that dies ends the others soon, and the last message is its own; with real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.images import TINY_RECIPE
from tests.helpers.ranks import ONE_THREAD, ROOT

ZERO3 = "{name: zero3, zero_optimization: {stage3_param_persistence_threshold: 0}}"
SOON = 60.0  # seconds from the fault to the end of the last process; on a quiet machine it takes about five


@dataclass
class End:
    """How a command ended.

    Attributes:
        code: exit code.
        said: its output on both streams.
        seconds: from the fault to the end of the last process.
    """

    code: int
    said: str
    seconds: float

    @property
    def last_line(self) -> str:
        return self.said.strip().splitlines()[-1]


@pytest.fixture
def recipe_file(tmp_path: Path, shards: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY_RECIPE.replace("PATH", str(shards)))
    return path


def arguments(recipe: Path, kind: str, rank: int, strategy: str) -> list[str]:
    fault = {
        "class_path": "tests.helpers.faults.Fault",
        "init_args": {"kind": kind, "steps": [3], "rank": rank},
    }
    place = [
        "--runs",
        str(recipe.parent / "runs"),
        "--run-id",
        "r",
        "--trainer.devices",
        "2",
        "--trainer.strategy",
        strategy,
    ]
    return [
        "run",
        str(recipe),
        *place,
        "--trainer.callbacks",
        json.dumps([fault]),
        "--checkpoint.every_n_steps",
        "2",
        "--health.max_skipped",
        "0",
    ]


def run(recipe: Path, kind: str, rank: int, strategy: str) -> End:
    """Run the command in a session of its own, so that processes left behind are found."""
    command = [sys.executable, "-m", "mhla_lightning", *arguments(recipe, kind, rank, strategy)]
    environment = {**os.environ, **ONE_THREAD, "PYTHONPATH": str(ROOT)}
    with (recipe.parent / "output").open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, cwd=recipe.parent, env=environment, start_new_session=True
        )
        try:
            code = process.wait(400)
            while left := _of_session(process.pid):
                assert time.time() - (recipe.parent / "runs" / "r" / "fault").stat().st_mtime < 2 * SOON, (
                    f"processes {left} stay behind"
                )
                time.sleep(0.1)
            seconds = time.time() - (recipe.parent / "runs" / "r" / "fault").stat().st_mtime
        finally:
            for pid in _of_session(process.pid):
                os.kill(pid, signal.SIGKILL)
    return End(code, (recipe.parent / "output").read_text(), seconds)


def _of_session(session: int) -> list[int]:
    """Processes of a session that have not ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # ended meanwhile
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


@pytest.mark.parametrize("strategy", ["ddp", pytest.param(ZERO3, id="zero3")])
@pytest.mark.slow
def test_an_exception_on_one_rank_is_shown_with_its_rank(recipe_file: Path, strategy: str) -> None:
    end = run(recipe_file, "exception", 1, strategy)
    assert end.code == 1
    assert "ZeroDivisionError: a mistake in somebody's layer\n[rank1]: on rank 1 of 2, process " in end.said
    assert end.said.count("Traceback") == 1, end.said
    assert "gloo" not in end.said
    expected = (
        "rank 1 of 2 ended with exit code 1, see its error above; the others were stopped; the same "
        "command resumes from step-00000002"
    )
    assert end.last_line == f"error: {expected}"
    assert end.seconds < SOON
    assert json.loads((recipe_file.parent / "runs" / "r" / "progress.json").read_text())["state"] == "failed"


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", pytest.param(ZERO3, id="zero3")])
def test_a_rank_that_is_killed_ends_the_others(recipe_file: Path, strategy: str) -> None:
    end = run(recipe_file, "kill", 1, strategy)
    assert end.code == 1
    assert end.last_line.startswith(
        "error: rank 1 of 2 was ended by SIGKILL (perhaps for lack of memory: see dmesg); the others were "
        "stopped"
    )
    assert "Traceback" not in end.said
    assert end.seconds < SOON
    assert not (recipe_file.parent / "runs" / "r" / "lock").exists()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", pytest.param(ZERO3, id="zero3")])
def test_nobody_outlives_rank_zero(recipe_file: Path, strategy: str) -> None:
    end = run(recipe_file, "kill", 0, strategy)
    assert end.code == -signal.SIGKILL
    assert end.seconds < SOON


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", pytest.param(ZERO3, id="zero3")])
@pytest.mark.parametrize(
    ("kind", "rank", "code", "last"),
    [
        ("exception", 0, 1, "[rank0]: on rank 0 of 2, process "),
        (
            "memory",
            1,
            2,
            "error: rank 1 of 2: out of memory after step 2 with `data.micro_batch_size` 8 "
            "(`data.batch_size` 16 = 2 ranks x 8 x 1",
        ),
        ("memory", 0, 2, "error: out of memory after step 2 with"),
        ("layer", 1, 2, "error: the loss of step 3 is not finite, and 1 steps in a row were left out"),
        ("hang", 1, 1, "error: rank 1 of 2 ended with exit code 1"),
    ],
    ids=["exception-rank-0", "memory-rank-1", "memory-rank-0", "all-alike", "hangs"],
)
def test_the_last_words_are_those_of_the_rank_that_failed(
    recipe_file: Path, strategy: str, kind: str, rank: int, code: int, last: str
) -> None:
    end = run(recipe_file, kind, rank, strategy)
    assert (end.code, end.last_line[: len(last)]) == (code, last), end.said
    assert end.said.count("error: ") == {"exception": 0, "hang": 2}.get(kind, 1), "told once"
    assert end.seconds < SOON
