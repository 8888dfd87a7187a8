"""The text of installed packages, read without importing them."""

from __future__ import annotations

import re
import sysconfig
from pathlib import Path


def text_of(file: str) -> str:
    """Return an installed file's text; empty where the package is not installed.

    Args:
        file: path below site-packages.
    """
    path = Path(sysconfig.get_paths()["purelib"], file)
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def is_defined(file: str, pattern: str) -> bool:
    """Whether an installed file has a line that a regular expression matches."""
    return re.search(pattern, text_of(file), re.MULTILINE) is not None
