"""Stand-ins for SLURM's commands where no SLURM is: each writes down how it was called and does what the
test says.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

Stub = Callable[[str, str], None]


def calls(folder: Path, name: str) -> list[list[str]]:
    """The arguments of every call of a stand-in."""
    log = folder / f"{name}.calls"
    return [call.split("\0")[:-1] for call in log.read_text().split("\x01\0")[:-1]] if log.exists() else []


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stub:
    """Writes a command that runs shell text: stub("squeue", "echo RUNNING"). It lies in tmp_path/bin,
    first on the path.
    """
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def write(name: str, body: str) -> None:
        path = folder / name
        path.write_text(f"#!/bin/bash\nprintf '%s\\0' \"$@\" $'\\x01' >>'{folder / name}.calls'\n{body}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    return write
