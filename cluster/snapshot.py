"""A job's record of its submission: the code, its git commit, the installed versions."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import mhla_lightning

_PACKAGES = (
    "lightning",
    "torch",
    "torchvision",
    "torchmetrics",
    "timm",
    "webdataset",
    "deepspeed",
    "tensorboard",
)


def package_folder() -> Path:
    """Return the folder of the package that this process runs."""
    return Path(mhla_lightning.__file__).parent


def copy_code(destination: Path) -> None:
    """Copy the package into `destination`/mhla_lightning, following links.

    Raises:
        OSError: the disk is full, for example.
    """
    target = destination / "mhla_lightning"
    if target.exists():
        shutil.rmtree(target)
    shutil.copytree(package_folder(), target, ignore=shutil.ignore_patterns("__pycache__"))


def environment() -> dict[str, Any]:
    """Return versions, host and interpreter; the packages are not imported for it."""
    versions = {"python": platform.python_version()}
    for name in ("mhla-lightning", *_PACKAGES):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {"host": platform.node(), "python": sys.executable, "versions": versions}


def git_state() -> dict[str, Any] | None:
    """Return commit, branch and changed files of the code; None where git knows none."""
    folder = package_folder()
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no") or ""
    return {
        "commit": commit,
        "branch": _git(folder, "rev-parse", "--abbrev-ref", "HEAD"),
        "changed": [line[3:] for line in changed.splitlines()],
    }


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.rstrip("\n") if done.returncode == 0 else None
