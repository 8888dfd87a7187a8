"""`mhla monitor`: the names under which TensorBoard shows runs, and the end of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from mhla_lightning.cli.monitor import link_runs


def make_run(folder: Path) -> Path:
    (folder / "tensorboard").mkdir(parents=True)
    (folder / "recipe.yaml").touch()
    return folder


def links(folder: Path) -> dict[str, Path]:
    return {str(path.relative_to(folder)): path.resolve() for path in folder.rglob("*") if path.is_symlink()}


def test_every_run_has_its_name_also_those_that_start_later(tmp_path: Path) -> None:
    root, shown = tmp_path / "runs", tmp_path / "links"
    shown.mkdir()
    digits, row = make_run(root / "digits"), make_run(root / "compare-1" / "mhla-seed0")
    (digits / "slurm").mkdir()
    (digits / "slurm" / "recipe.yaml").touch()  # a job's copy, no run
    link_runs([], root, shown)
    expected = {"digits": digits / "tensorboard", "compare-1/mhla-seed0": row / "tensorboard"}
    assert links(shown) == expected
    later = make_run(root / "later")
    link_runs([], root, shown)
    assert links(shown) == expected | {"later": later / "tensorboard"}
    assert not list((digits / "tensorboard").iterdir())


def test_one_run_has_its_name_too(tmp_path: Path) -> None:
    root, shown = tmp_path / "runs", tmp_path / "links"
    shown.mkdir()
    run = make_run(root / "digits")
    make_run(root / "other")
    link_runs(["digits"], root, shown)
    assert links(shown) == {"digits": run / "tensorboard"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda one: one.name)
def test_a_signal_ends_tensorboard_too(tmp_path: Path, number: signal.Signals) -> None:
    """It reaches this process alone, as from `kill` or a job's end; a terminal's Ctrl-C reaches both."""
    make_run(tmp_path / "runs" / "digits")
    monitor = subprocess.Popen(
        [sys.executable, "-m", "mhla_lightning", "monitor", "--runs", str(tmp_path / "runs"), "--port", "0"],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    children = Path(f"/proc/{monitor.pid}/task/{monitor.pid}/children")
    until = time.monotonic() + 30
    while not (found := children.read_text().split()) and time.monotonic() < until:
        time.sleep(0.05)
    (tensorboard,) = found
    assert "tensorboard.main" in Path("/proc", tensorboard, "cmdline").read_text()
    assert list(tmp_path.glob("mhla-monitor-*"))
    monitor.send_signal(number)
    try:
        assert monitor.wait(20) == 0
        assert not Path("/proc", tensorboard).exists()
    finally:
        for pid in (monitor.pid, int(tensorboard)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    assert not list(tmp_path.glob("mhla-monitor-*"))
