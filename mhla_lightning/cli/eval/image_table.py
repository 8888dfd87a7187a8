"""Print the numbers of generated images."""

from __future__ import annotations

from collections.abc import Mapping

HEADINGS = {
    "agreement": "agreement",
    "what": "agreement of what",
    "where": "agreement of where",
    "real_agreement": "agreement of real images",
    "fid": "FID",
    "sfid": "sFID",
    "inception_score": "IS",
    "fd": "FD on own features",
    "sfd": "sFD on own features",
    "class_score": "IS on own classes",
    "precision": "precision",
    "recall": "recall",
    "images_per_second": "images/s",
    "clip_score": "CLIP score",
    "dpg": "DPG-Bench, %",
}


def print_numbers(
    title: str, numbers: Mapping[str, float], intervals: Mapping[str, tuple[float, float]] | None = None
) -> None:
    """Print one line for each number, under its heading or else its name.

    Args:
        title: of the table.
        numbers: by name.
        intervals: 95 % intervals of some of them.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title))
    table.add_column("number")
    table.add_column("value", justify="right")
    for key, value in numbers.items():
        low, high = (intervals or {}).get(key, (None, None))
        beside = "" if low is None else f" ({low:.4f} to {high:.4f})"
        table.add_row(HEADINGS.get(key, key), f"{value:.4f}{beside}")
    Console().print(table)
