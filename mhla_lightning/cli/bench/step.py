"""Measure a recipe's training step under Lightning beside a bare PyTorch loop.

RECIPE and overrides are those of `lightning run`. Both sides take the same batches in turn, step by step, and
must come to the same losses.
"""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mhla_lightning.cli.bench.on_gpu import machine_name
from mhla_lightning.cli.output import demand_at_least, summary_table, write_json

if TYPE_CHECKING:
    from mhla_lightning.bench.step_speed import StepTimes
    from mhla_lightning.config.resolve import Resolved

HELP = "a recipe's training step under Lightning and in a bare loop, and where the difference goes"
EXAMPLE = "classification/deit_tiny_mhla_mnist_cpu --steps 20"
TAKES_OVERRIDES = True
_TITLE = (
    "Lightning's steps over bare ones, by the clock and by CPU time; Lightning's own (the lower rows) "
    "over a bare step"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `mhla bench step`."""
    parser.usage = "%(prog)s RECIPE [options] [--dotted.key VALUE ...]"
    parser.add_argument("recipe", metavar="RECIPE", help="name of a packaged recipe, or path of a YAML file")
    parser.add_argument(
        "--steps",
        type=int,
        default=10,
        metavar="N",
        help="optimizer steps of a side in a turn (default: %(default)s)",
    )
    parser.add_argument(
        "--turns",
        type=int,
        default=5,
        help="measured turns after a warm-up, at least 5 (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Carries out the verb."""
    demand_at_least(args, steps=1, turns=5)
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as `lightning run`
    recipe = _resolve(args)
    import torch
    from rich.console import Console
    from rich.progress import Progress

    from mhla_lightning.bench.step_speed import measure

    data = "the recipe's own" if recipe.data.is_ready() else "synthetic, as the recipe's own is not there"
    with tempfile.TemporaryDirectory(prefix="mhla-bench-") as folder, Progress(transient=True) as progress:
        bar = progress.add_task("measuring", total=args.turns + 1)
        times = measure(recipe, Path(folder, "step"), args.steps, args.turns, lambda: progress.advance(bar))
    machine = machine_name(times.device)
    console = Console()
    console.print(
        f"{machine}; {args.recipe}: {times.parameters:,} parameters, batches of {times.batch_size}, "
        f"data {data}; torch {torch.__version__}"
    )
    for table in _tables(args, times):
        console.print(table)
    how = {
        "recipe": args.recipe,
        "overrides": args.overrides,
        "data": data,
        "machine": machine,
        "steps": args.steps,
    }
    write_json(args.json, _result(times) | how)
    return 0


def _resolve(args: argparse.Namespace) -> Resolved:
    """The recipe with its overrides, and Lightning quiet."""
    from mhla_lightning.config.recipes import apply_overrides, load_recipe, parse_overrides

    values = apply_overrides(load_recipe(args.recipe).values, parse_overrides(args.overrides))
    from mhla_lightning.config.resolve import resolve

    resolved = resolve(values)
    resolved.take_from_data()
    for name in (
        "lightning.pytorch",
        "lightning.fabric",
    ):  # after the imports: Lightning sets its own level in them
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("mhla_lightning.tasks.optimization").setLevel(
        logging.ERROR
    )  # these steps are part of a longer run's warm-up
    warnings.filterwarnings(
        "ignore", message=r".*isinstance\(treespec, LeafSpec\)"
    )  # Lightning 2.6.6 on torch 2.14, Lightning's to change
    return resolved


def _result(times: StepTimes) -> dict[str, Any]:
    facts = {
        "parameters": times.parameters,
        "batch_size": times.batch_size,
        "loss": times.loss,
        "extra_seconds": times.extra_seconds,
        "ratios": times.ratios,
    }
    return {"rows": times.rows(), "breakdown": times.breakdown(), "summary": times.summary(), **facts}


def _tables(args: argparse.Namespace, times: StepTimes) -> list[Any]:
    from rich.table import Table

    sides = Table(
        title=(
            f"a training step: median and range of {args.turns} turns of {args.steps} steps; both sides "
            f"end at loss {times.loss:.6g}"
        )
    )
    for heading in ("side", "ms a step", "range", "CPU ms", "samples/s"):
        sides.add_column(heading, justify="left" if heading == "side" else "right")
    for row in times.rows():
        span = f"{row['fastest_seconds'] * 1e3:,.1f} - {row['slowest_seconds'] * 1e3:,.1f}"
        sides.add_row(
            row["side"],
            f"{row['step_seconds'] * 1e3:,.1f}",
            span,
            f"{row['cpu_seconds'] * 1e3:,.1f}",
            f"{row['samples_per_second']:,.1f}",
        )
    parts = Table(title="where it goes: ms a step, medians of the turns", show_footer=True)
    low, high = min(times.ratios), max(times.ratios)
    title = f"{_TITLE}; the turns' ratios by the clock lie between {low:.3f} and {high:.3f}"
    rows, keys = times.breakdown(), ("lightning_seconds", "bare_seconds", "extra_seconds")
    parts.add_column("source", "together")
    for key in keys:
        parts.add_column(
            key.removesuffix("_seconds"), f"{sum(row[key] for row in rows) * 1e3:,.3f}", justify="right"
        )
    for row, after in zip(rows, [*rows[1:], rows[-1]], strict=True):
        parts.add_row(
            row["source"],
            *(f"{row[key] * 1e3:,.3f}" for key in keys),
            end_section=row["same_calls"] and not after["same_calls"],
        )
    return [sides, parts, summary_table(title, times.summary(), digits=4)]
