"""Print the numbers of generated images."""

from __future__ import annotations

from collections.abc import Mapping

HEADINGS = {
    "agreement": "agreement",
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


def print_numbers(title: str, numbers: Mapping[str, float]) -> None:
    """Print one line for each number, under its heading or else its name."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title))
    table.add_column("number")
    table.add_column("value", justify="right")
    for key, value in numbers.items():
        table.add_row(HEADINGS.get(key, key), f"{value:.4f}")
    Console().print(table)
