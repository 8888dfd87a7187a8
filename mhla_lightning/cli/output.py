"""Tables, JSON files and progress bars of the verbs, and the checks of their arguments."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mhla_lightning.errors import UserError
from mhla_lightning.runs.folder import NO_ROOM

if TYPE_CHECKING:
    from rich.console import Console

OnProgress = Callable[[str, int, int], None]  # split, done, in all


def demand_at_least(args: argparse.Namespace, **least: int) -> None:
    """Raise UserError for an argument below its least value."""
    for name, value in least.items():
        if getattr(args, name) < value:
            raise UserError(name, f"{getattr(args, name)} is too small; it must be at least {value}")


def folder_named_after(verb: str, names: Sequence[str]) -> Path:
    """Return the folder that a verb writes by default; other runs get another folder.

    Args:
        verb: begins the name.
        names: of the runs.
    """
    if len(names) == 1:
        return Path(f"{verb}-{names[0]}")
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()[:6]
    return Path(f"{verb}-{names[0]}-and-{len(names) - 1}-more-{digest}")


def load() -> str:
    """Return the processes that want a core, averaged over the last minute, as text."""
    return f"load {os.getloadavg()[0]:.1f}"


@contextmanager
def measuring_bar(console: Console, total: int) -> Iterator[Callable[[str], None]]:
    """Show a bar of measurements on a terminal.

    Args:
        console: the terminal.
        total: number of measurements.

    Yields:
        a function to call with the name of each measurement when it begins.
    """
    from rich.progress import Progress

    with Progress(console=console, transient=True) as progress:
        bar, done = progress.add_task("measuring", total=total), count()
        yield lambda name: progress.update(bar, description=f"measuring {name}", completed=next(done))


@contextmanager
def progress_bars(console: Console) -> Iterator[OnProgress]:
    """Show a bar for each split; the block gets the function that moves them."""
    from rich.progress import MofNCompleteColumn, Progress, TaskID, TimeRemainingColumn

    bars: dict[str, TaskID] = {}
    progress = Progress(
        *Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn(), console=console
    )

    def advance(split: str, done: int, total: int) -> None:
        progress.start()  # not before: it would leave an empty line above the sentence about a mistake
        if split not in bars:
            bars[split] = progress.add_task(split, total=total)
        progress.update(bars[split], completed=done)

    try:
        yield advance
    finally:
        if bars:
            progress.stop()


def summary_table(title: str, summary: dict[str, float], digits: int = 2) -> Any:
    """Return a table of ratios."""
    from rich.table import Table

    table = Table(title=title)
    table.add_column("ratio")
    table.add_column("value", justify="right")
    for key, value in summary.items():
        table.add_row(key, f"{value:.{digits}f}")
    return table


def check_json(path: str | None) -> None:
    """Refuse, before any work, a --json file that could not be written."""
    check_writable("json", path)


def check_writable(key: str, file: str | None) -> None:
    """Refuse, before any work, a file that could not be written.

    Raises:
        UserError: its folder does not exist, it is a folder, or this user may not write it; `key` is the
            error's.
    """
    if file is None:
        return
    path = Path(file).absolute()
    if not path.parent.is_dir():
        raise UserError(key, f"{file} has no folder {path.parent} to be in")
    if path.is_dir():
        raise UserError(key, f"{file} is a folder; name a file")
    wanted = path if path.exists() else path.parent
    if not os.access(wanted, os.W_OK):
        raise UserError(key, f"{file} cannot be written: no right to write {wanted}")


def make_folder(key: str, folder: Path) -> None:
    """Make a folder that :func:`runs.folder.check_folder` let pass.

    Raises:
        UserError: the file system has other reasons; `key` is the error's.
        OSError: the disk is full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in NO_ROOM:
            raise
        raise UserError(key, f"{folder} cannot be made: {error.strerror}") from error


def write_json(path: str | None, result: Mapping[str, Any]) -> None:
    """Write a result as JSON.

    Args:
        path: of the file; None writes nothing.
        result: plain values.
    """
    if path is not None:
        Path(path).write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
