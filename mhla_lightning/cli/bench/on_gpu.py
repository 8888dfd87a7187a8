"""What the measuring verbs share on a GPU: options, columns, notes and the plot."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mhla_lightning.cli.output import load

if TYPE_CHECKING:
    import torch

Rows = Sequence[Mapping[str, Any]]


def add_gpu_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verbs that plot and that replay short calls on a GPU."""
    parser.add_argument(
        "--no-graphs",
        action="store_true",
        help="on a GPU, launch short calls one by one instead of replaying CUDA graphs",
    )
    parser.add_argument("--plot", metavar="FILE", help="write the times as a PNG")


def chosen_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """Return the dtype of a name; None is bf16 on a GPU, else float32."""
    import torch

    short = name == "bf16" or (name is None and device.type == "cuda")
    return torch.bfloat16 if short else torch.float32


def machine_name(device: torch.device) -> str:
    """Return what measured, in words."""
    import torch

    if device.type == "cpu":
        return f"{torch.get_num_threads()} threads, {load()}"
    return torch.cuda.get_device_name(device)


def gpu_headings(rows: Rows) -> list[str]:
    """Return the headings of columns that only rows of a GPU have."""
    return ["quartiles apart", "modelled step"] if any("step_runs" in row for row in rows) else []


def gpu_cells(row: Mapping[str, Any]) -> list[str]:
    """Return the cells under `gpu_headings`, in milliseconds."""
    if "step_runs" not in row:
        return []
    modelled = row.get("step_modelled_seconds")
    return [f"{row['step_spread_seconds'] * 1e3:.3f}", "-" if modelled is None else f"{modelled * 1e3:.3f}"]


def gpu_notes(rows: Rows) -> list[str]:
    """Return a line for each way in which rows ran, with the rows that ran so."""
    ways: dict[str, list[str]] = {}
    for row in rows:
        for key, kind in (("softmax", "softmax"), ("forward_runs", "forward"), ("step_runs", "step")):
            if key in row:
                way = f"{kind} with {row[key]}" if key == "softmax" else f"{kind} {row[key]}"
                ways.setdefault(way, []).append(f"{row['operator']} {row['tokens']:,}")
    return [f"{way}: {', '.join(dict.fromkeys(names))}" for way, names in ways.items()]


def plot_rows(
    path: str | None, title: str, sizes: str, rows: Rows, size: str = "tokens", key: str = "step_seconds"
) -> None:
    """Write a plot of rows where a file is named.

    Args:
        path: of the PNG; None writes nothing.
        title: above the plot.
        sizes: what the horizontal axis counts.
        rows: as in the JSON file, with their `operator`.
        size, key: keys of a row's size and seconds.
    """
    if path is None:
        return
    from pathlib import Path

    from mhla_lightning.bench.plot import write_plot

    measured: dict[str, list[tuple[float, float]]] = {}
    modelled: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        measured.setdefault(row["operator"], []).append((row[size], 1e3 * row[key]))
        if row.get("step_modelled_seconds") is not None:
            point = (row[size], 1e3 * row["step_modelled_seconds"])
            modelled.setdefault(row["operator"], []).append(point)
    write_plot(Path(path), title, sizes, measured, modelled)
