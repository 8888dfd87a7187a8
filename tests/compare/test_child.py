"""Runs in processes of their own: how many at once, what ends them, what their end says."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from mhla_lightning.cli.run import shown
from mhla_lightning.compare import child
from mhla_lightning.runs.folder import RunFolder


def test_share_done(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert child.share_done(run) == 0.0
    run.progress.write_text('{"step": 3, "max_steps": 4}')
    assert child.share_done(run) == 0.75


def test_warnings_of_a_log_come_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As `mhla run` prints them."""
    logger = logging.getLogger("mhla_lightning.tasks")
    with shown():
        for _ in range(2):
            logger.warning("all of it is warm-up")
        logger.info("a line")
    (tmp_path / "run.log").write_text(capsys.readouterr().out)
    assert "\na line\n" in (tmp_path / "run.log").read_text()
    assert child.warnings_in(tmp_path / "run.log") == ["all of it is warm-up"]
    assert child.warnings_in(tmp_path / "none.log") == []


def child_run(folder: Path, name: str) -> child.ChildRun:
    return child.ChildRun("r", RunFolder(folder / name), [], folder / f"{name}.log")


def test_children_run_at_once_and_none_is_started_after_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two at once, of which the second fails while the first still works: the third never starts, the
    first ends in peace.
    """
    start = subprocess.Popen
    code = (
        "import sys, time, os, pathlib; name = sys.argv[-1]; print(os.environ['OMP_NUM_THREADS'], "
        "flush=True)\n"
        "pathlib.Path(name + '.started').touch()\n"
        "while name.endswith('a') and not pathlib.Path(name[:-1] + 'b.started').exists(): time.sleep(0.01)\n"
        "time.sleep(1.5 if name.endswith('a') else 0); sys.exit(3 if name.endswith('b') else 0)"
    )

    def fake(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        folder, name = command[command.index("--runs") + 1], command[command.index("--run-id") + 1]
        return start([sys.executable, "-c", code, f"{folder}/{name}"], **options)

    monkeypatch.setattr(child.subprocess, "Popen", fake)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    ended: list[tuple[str, int]] = []
    done: list[float] = []
    result = child.train_in_children(
        [child_run(tmp_path, name) for name in "abc"],
        2,
        done.append,
        lambda one, code: ended.append((one.run.run_id, code)),
    )
    assert result == 3
    assert ended == [("b", 3), ("a", 0)]
    assert done[-1] == 2.0
    assert not (tmp_path / "c.started").exists()
    assert (tmp_path / "a.log").read_text() == f"{max(1, (os.cpu_count() or 1) // 2)}\n"


def test_a_signal_to_us_reaches_the_run_and_shows_in_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, sleeper = (
        tmp_path / "run.log",
        [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"],
    )
    start = subprocess.Popen
    monkeypatch.setattr(child.subprocess, "Popen", lambda command, **options: start(sleeper, **options))

    def stop_when_up() -> None:
        while not log.is_file() or b"up" not in log.read_bytes():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop_when_up)
    thread.start()
    before = signal.getsignal(signal.SIGTERM)
    assert (
        child.train_in_children([child_run(tmp_path, "run")], 1, lambda done: None, lambda run, code: None)
        == 128 + signal.SIGTERM
    )
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(("keep_going", "started"), [(False, "a"), (True, "abc")])
def test_a_failure_ends_all_or_the_others_go_on(
    keep_going: bool, started: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = subprocess.Popen
    monkeypatch.setattr(child, "_POLL", 0.01)
    failing = [sys.executable, "-c", "import os; print(os.environ['OMP_NUM_THREADS']); exit(3)"]
    monkeypatch.setattr(child.subprocess, "Popen", lambda command, **options: start(failing, **options))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    ended: list[str] = []
    code = child.train_in_children(
        [child.ChildVerb(["analyze"], tmp_path / f"{name}.log") for name in "abc"],
        1,
        lambda done: None,
        lambda one, code: ended.append(one.log.stem),
        keep_going=keep_going,
        threads=1,
    )
    assert code == 3
    assert "".join(ended) == started
    assert (tmp_path / "a.log").read_text() == "1\n"


def test_after_a_signal_to_us_nothing_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = subprocess.Popen
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]

    def popen(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return start(sleeper, **options)

    monkeypatch.setattr(child.subprocess, "Popen", popen)
    ended: list[str] = []
    code = child.train_in_children(
        [child_run(tmp_path, name) for name in "ab"],
        1,
        lambda done: None,
        lambda one, code: ended.append(one.run.run_id),
        keep_going=True,
    )
    assert (code, ended) == (128 + signal.SIGTERM, ["a"])
