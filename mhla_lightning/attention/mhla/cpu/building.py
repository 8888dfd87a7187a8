"""Compiles `dense.cpp` once for a machine, and loads it.

The code is small and uses torch's stable interface, so that a compiler needs a few seconds. Where there is no
compiler, callers keep torch's own operations.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("dense.cpp")
COMPILERS = ("g++", "clang++", "c++")
FLAGS = ("-O3", "-march=native", "-std=c++20", "-fPIC", "-shared")
_TORCH = Path(torch.__file__).parent
LIBRARIES = (f"-L{_TORCH / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10")
_PATIENCE = 300  # seconds for the compiler

_logger = logging.getLogger(__name__)


@cache
def loaded() -> str | None:
    """Load the operators `mhla::short_rows` and `mhla::short_rows_backward` into this process.

    Compiles them first where the user's cache has none for this processor, this torch and this code.

    Returns:
        None where they are there, else the reason why they are not.
    """
    compiler = find_compiler()
    if compiler is None:
        return f"no C++ compiler was found: none of CXX, {', '.join(COMPILERS)}"
    try:
        library = _place(compiler)
        _make_private(library.parent)
        if not library.is_file():
            _logger.info("compiling MHLA for short rows on this processor, once, in some seconds")
            compile_into(library, compiler)
        torch.ops.load_library(str(library))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        reason = f"dense.cpp was not compiled by {compiler}: {_last_line(error)}"
        _logger.info("%s; MHLA of short rows takes torch's own operations", reason)
        return reason
    return None


def find_compiler() -> str | None:
    """Return the path of the compiler that CXX names, else of the first known one."""
    named = os.environ.get("CXX")
    candidates = (named,) if named else COMPILERS
    return next((path for path in map(shutil.which, candidates) if path), None)


def compile_into(library: Path, compiler: str) -> None:
    """Write the compiled code; processes that do so at once do not disturb each other.

    Raises:
        subprocess.SubprocessError: the compiler failed or took too long.
        OSError: the folder cannot be written.
    """
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        command = [compiler, *FLAGS, f"-I{_TORCH / 'include'}", str(SOURCE), "-o", str(made)]
        subprocess.run([*command, *LIBRARIES], check=True, capture_output=True, text=True, timeout=_PATIENCE)
        made.replace(library)


def _make_private(folder: Path) -> None:
    """Make the folder of the compiled code; what others may write there is never loaded.

    Raises:
        OSError: others own the folder or may write to it, or it cannot be made.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise OSError(f"{folder} belongs to another user, or others may write to it")


def _place(compiler: str) -> Path:
    """Return where the library of this processor, compiler, torch and code lies."""
    parts = (SOURCE.read_bytes(), torch.__version__, compiler, platform.machine(), _processor(), FLAGS)
    name = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "mhla_lightning" / f"short_rows_{name}.so"


def _processor() -> str:
    """Return what tells apart processors that need code of their own.

    A home may be shared by several.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _last_line(error: Exception) -> str:
    output = getattr(error, "stderr", None) or str(error)
    return output.strip().splitlines()[-1] if output.strip() else type(error).__name__
