"""A run that is told to stop: what signals and the clock do, and two real processes of which one is told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mhla_lightning.callbacks.preemption import JobClock
from mhla_lightning.runs.folder import complete_checkpoints, read_metrics
from mhla_lightning.runs.stopping import SIGNALS, Preempted, stop_signals


def test_a_signal_stops_the_start_and_is_only_noted_in_training() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(Preempted, match="SIGUSR1"), stop_signals():
        os.kill(os.getpid(), signal.SIGUSR1)
    try:
        assert [signal.getsignal(number) for number in SIGNALS] == [signal.SIG_IGN] * 2, "until exit"
        with stop_signals() as signals:
            signals.wait_for_step()
            os.kill(os.getpid(), signal.SIGTERM)
            assert signals.received == "SIGTERM"
            signals.act_at_once()
            with pytest.raises(Preempted, match="SIGTERM"):
                os.kill(os.getpid(), signal.SIGTERM)
            signals.ignore()
            os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        for number, handler in zip(SIGNALS, before, strict=True):
            signal.signal(number, handler)


def test_signals_do_what_they_did_after_a_run() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with stop_signals():
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize(
    ("left", "steps", "save", "over"),
    [
        (20.0, [0.1], 1.0, False),
        (16.0, [0.1], 1.0, True),
        (60.0, [0.1], 25.0, True),
        (60.0, [0.1], 10.0, False),
        (60.0, [0.1, 30.0], 1.0, True),
    ],
    ids=["time left", "only the reserve left", "long save", "save that fits", "long step"],
)
def test_the_clock_leaves_time_for_two_steps_and_two_saves(
    left: float, steps: list[float], save: float, over: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    clock = JobClock(end=2000.0)
    clock.step()
    for seconds in steps:
        now[0] += seconds
        clock.step()
    now[0] = 2000.0 - left
    assert clock.is_over(save) is over


def test_the_clock_never_gives_more_than_half_of_a_job_away(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    clock = JobClock(end=100.0)
    now[0] = 49.0
    assert not clock.is_over(1000.0)
    now[0] = 51.0
    assert clock.is_over(1000.0)
    assert not JobClock(float("inf")).is_over(1000.0)


def runs(pid: int) -> bool:
    """Whether a process is there; one that has ended and waits for init to take note of it is not."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.usefixtures("forked")
def test_one_of_two_processes_is_told_and_both_stop_at_the_same_step(recipe: Path, tmp_path: Path) -> None:
    """Real gloo. The second process gets the signal; the checkpoint is that of the step where both stop,
    and nothing is left running.
    """
    folder = tmp_path / "runs" / "told"
    words = [
        "run",
        str(recipe),
        "--run-id",
        "told",
        "--trainer.devices",
        "2",
        "--trainer.strategy",
        "ddp",
        "--trainer.max_steps",
        "100000",
    ]
    words += ["--checkpoint.every_n_steps", "100000", "--trainer.val_check_interval", "100000"]
    with subprocess.Popen(
        [sys.executable, "-m", "mhla_lightning", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        deadline = time.monotonic() + 200
        while (
            len(read_metrics(folder / "metrics.jsonl").get("train/loss", [])) < 5
            and process.poll() is None
            and time.monotonic() < deadline
        ):
            time.sleep(0.1)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        second = next(
            int(child)
            for child in children
            if b"mhla_lightning" in Path(f"/proc/{child}/cmdline").read_bytes()
        )
        for _ in range(3):  # a second one does no more than the first
            os.kill(second, signal.SIGUSR1)
            time.sleep(0.02)
        said, _ = process.communicate(timeout=120)
    assert process.returncode == 75, said
    assert "stopped by another process; the same command resumes from step-" in said
    progress = json.loads((folder / "progress.json").read_text())
    (saved,) = complete_checkpoints(folder)
    assert (progress["state"], progress["last_checkpoint"]) == ("preempted", saved.name)
    assert (
        int(saved.name.removeprefix("step-"))
        == progress["step"]
        == read_metrics(folder / "metrics.jsonl")["train/loss"][-1][0]
    )
    state = json.loads((saved / "state.json").read_text())
    assert (state["world_size"], state["consumed"]) == (2, 16 * progress["step"])
    assert state["save_seconds"] > 0
    deadline = time.monotonic() + 20
    while runs(second):
        assert time.monotonic() < deadline, "the second process is left running"
        time.sleep(0.1)
    assert not (folder / "lock").exists()
