"""What all subjects of `mhla bench` check and show alike."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mhla_lightning.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console


def demand_at_least(args: argparse.Namespace, **least: int) -> None:
    """Raises UserError for an argument below its least value."""
    for name, value in least.items():
        if getattr(args, name) < value:
            raise UserError(
                f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least {value}"
            )


def load() -> str:
    """Processes that want a core now, over the last minute."""
    return f"load {os.getloadavg()[0]:.1f}"


@contextmanager
def measuring_bar(console: Console, total: int) -> Iterator[Callable[[str], None]]:
    """A bar of so many measurements on a terminal; what it gives is called with the name of each as it
    begins.
    """
    from rich.progress import Progress

    with Progress(console=console, transient=True) as progress:
        bar, done = progress.add_task("measuring", total=total), count()
        yield lambda name: progress.update(bar, description=f"measuring {name}", completed=next(done))


def summary_table(title: str, summary: dict[str, float], digits: int = 2) -> Any:
    """A rich table of ratios."""
    from rich.table import Table

    table = Table(title=title)
    table.add_column("ratio")
    table.add_column("value", justify="right")
    for key, value in summary.items():
        table.add_row(key, f"{value:.{digits}f}")
    return table


def check_json(path: str | None) -> None:
    """Raises UserError, before anything is measured, for a --json whose folder does not exist."""
    if path is not None and not Path(path).absolute().parent.is_dir():
        raise UserError(f"--json {path}: there is no folder {Path(path).absolute().parent}")


def write_json(path: str | None, result: dict[str, Any]) -> None:
    """Writes the result where --json asks for it."""
    if path is not None:
        Path(path).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
