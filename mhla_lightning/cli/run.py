"""Train a recipe and validate it; the same command again resumes the run.

RECIPE is a name of `mhla recipes list` or the path of a YAML file. Overrides follow as --dotted.key VALUE.

  lightning run classification/deit_tiny_mhla_mnist_cpu --model.attention softmax --trainer.max_steps 200
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from mhla_lightning.compare.child import WARNING
from mhla_lightning.config.recipes import parse_overrides
from mhla_lightning.training.launch import RunOptions, launch, quiet_libraries, read_recipe

TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mhla run`."""
    parser.usage = "%(prog)s RECIPE [options] [--dotted.key VALUE ...]"
    parser.add_argument("recipe", metavar="RECIPE", help="name of a packaged recipe, or path of a YAML file")
    add_place(parser)
    parser.add_argument(
        "--mode",
        choices=["fit", "validate", "test"],
        default="fit",
        help="fit trains and validates (default)",
    )
    parser.add_argument(
        "--ckpt",
        metavar="PATH",
        help="checkpoint folder or run for --mode validate and test (default: the run's newest)",
    )
    parser.add_argument("--print_config", action="store_true", help="print the resolved recipe and stop")


def add_place(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say where a run lives."""
    parser.add_argument("--runs", metavar="DIR", help="folder of all runs (default: $MHLA_RUNS, else ./runs)")
    parser.add_argument(
        "--run-id",
        metavar="NAME",
        help="name of the run (default: recipe name and a hash of the resolved recipe)",
    )
    parser.add_argument(
        "--fresh", action="store_true", help="start anew in NAME-2, NAME-3, ... instead of resuming"
    )
    parser.add_argument(
        "--accept-changes", action="store_true", help="resume a run although the recipe has changed"
    )


def run(args: argparse.Namespace) -> int:
    """Train or evaluate a recipe; return the exit code."""
    overrides = parse_overrides(args.overrides)
    if args.print_config:
        print_config(args.recipe, overrides)
        return 0
    options = RunOptions(args.runs, args.run_id, args.fresh, args.accept_changes, args.mode, args.ckpt)
    with shown():
        return launch(args.recipe, overrides, options, Terminal())


@contextmanager
def shown() -> Iterator[None]:
    """Print what the package logs in the block."""
    logger = logging.getLogger("mhla_lightning")
    before = logger.handlers, logger.level
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_Marked())
    logger.handlers, logger.level = [handler], logging.INFO
    try:
        yield
    finally:  # a later command of this process may have another stdout
        logger.handlers, logger.level = before


class _Marked(logging.Formatter):
    """Marks warnings, so that `mhla compare` finds them in the logs of its runs."""

    def format(self, record: logging.LogRecord) -> str:
        return f"{WARNING if record.levelno >= logging.WARNING else ''}{super().format(record)}"


class Terminal:
    """Prints the progress of a run."""

    def line(self, text: str) -> None:
        print(text, flush=True)

    def problem(self, text: str) -> None:
        print(text, file=sys.stderr)

    def metrics(self, title: str, last: Mapping[str, float], best: Mapping[str, float] | None = None) -> None:
        from rich.console import Console
        from rich.table import Table

        table = Table(title=title)
        for heading in ("tag", "value", "best") if best else ("tag", "value"):
            table.add_column(heading, justify="left" if heading == "tag" else "right")
        for tag, value in sorted(last.items()):
            table.add_row(tag, f"{value:.4f}", *([f"{best[tag]:.4f}"] if best else []))
        Console().print(table)


def print_config(name: str, overrides: Mapping[str, Any]) -> None:
    """Print a recipe with every default filled in."""
    recipe = read_recipe(name, overrides)
    from mhla_lightning.config.length import length
    from mhla_lightning.config.resolve import resolve

    quiet_libraries()
    resolved = resolve(recipe.values)
    if resolved.values["data"]["init_args"].get("epochs") is not None and resolved.data.is_ready():
        resolved.values["trainer"]["max_steps"] = length(resolved)
    print(resolved.to_yaml(), end="")
