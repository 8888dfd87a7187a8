"""What a study ran on, and for how long: study.json in its folder. Imports no torch."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mhla_lightning.cluster.snapshot import environment, git_state
from mhla_lightning.runs.folder import FORMAT, read_object, write_json

FILE = "study.json"
_CPUINFO = Path("/proc/cpuinfo")


def machine() -> dict[str, Any]:
    """Return processor, cores, versions and commit."""
    state = git_state()
    versions = environment()["versions"]
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "torch": versions.get("torch", ""),
        "python": versions["python"],
        "version": versions.get("mhla-lightning", ""),
        "commit": state["commit"] if state else "",
        "changed": bool(state and state["changed"]),
    }


def cpu_model() -> str:
    """Return the name of the processor."""
    try:
        lines = _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


class StudyStart:
    """One start of a study; it is written at once, so that a killed one counts too.

    Args:
        folder: of the study.
        jobs: processes at once.
    """

    def __init__(self, folder: Path, jobs: int) -> None:
        self.file = folder / FILE
        self.before = sessions(folder)
        self.began = time.monotonic()
        load = round(os.getloadavg()[0], 1)
        self.facts = {"started": _now(), "jobs": jobs, "load": load, **machine()}

    def write(self) -> None:
        """Write date and seconds up to now."""
        seconds = round(time.monotonic() - self.began, 1)
        whole = [*self.before, {**self.facts, "ended": _now(), "seconds": seconds}]
        write_json(self.file, {"format": FORMAT, "sessions": whole})


@contextmanager
def started(folder: Path, jobs: int) -> Iterator[StudyStart]:
    """Record a start of a study, also where it ends by an error."""
    one = StudyStart(folder, jobs)
    one.write()
    try:
        yield one
    finally:
        one.write()


def sessions(folder: Path) -> list[dict[str, Any]]:
    """Return the starts of a study, in order; empty where it never began."""
    found = read_object(folder / FILE).get("sessions")
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
