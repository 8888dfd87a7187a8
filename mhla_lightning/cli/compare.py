"""Train variants of a recipe side by side: one table, one plot.

Rows come from --over (several multiply) or from a file of named variants. Under --over 'model.attention=...'
the bare name of the recipe's operator keeps the recipe's options; {name: mhla} has none.
Each row and seed is an ordinary run; a finished one is reused.
  mhla compare classification/deit_tiny_mhla_mnist_cpu --over 'model.attention=[linear, mhla]' --seeds 0,1,2
  mhla compare RECIPE --variants variants.yaml   # a line of it: small lr: {model.optimizer.lr: 1e-4}
With several seeds each row is also compared with the first, seed by seed (--against takes another row).
Further --dotted.key VALUE overrides hold for every row; where both set a key, the row's value counts.
--eval runs a further evaluation on every finished run, and keeps its numbers in the run folder:
  mhla compare RECIPE --over ... --eval 'samples: {classifier: my_classifier, n: 500, guidance: 3}'
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from mhla_lightning.cli.output import check_json, demand_at_least
from mhla_lightning.compare.child import ChildRun, train_in_children, warnings_in
from mhla_lightning.compare.comparison import COSTS, headline, rich_table, score_tags
from mhla_lightning.compare.fairness import remarks, warned
from mhla_lightning.compare.plan import (
    Comparison,
    Measured,
    check_rows,
    finished_line,
    log_end,
    make_folder,
    measure_runs,
    table_rows,
)
from mhla_lightning.compare.significance import as_json, difference_table, paired_differences
from mhla_lightning.compare.variants import VariantRow, identity, rows_from_file, rows_over, seed_list
from mhla_lightning.config.moved_keys import flat
from mhla_lightning.config.recipes import load_recipe, parse_overrides, variants_file
from mhla_lightning.errors import UserError, unknown_name
from mhla_lightning.evaluation import EVALUATIONS, requested_evaluation
from mhla_lightning.runs.folder import FORMAT, read_metrics, runs_root, write_json
from mhla_lightning.runs.lock import hold

TAKES_OVERRIDES = True
_INTERRUPTED = 130  # what a shell reports for Ctrl-C
_WIDE = 240  # columns where no terminal limits them


@dataclass(frozen=True)
class _Wanted:
    """A comparison as the verb trains it.

    Args:
        plan: rows, seeds and folder.
        jobs: runs trained at once.
        against: name of the row that the others are compared with, seed by seed.
    """

    plan: Comparison
    jobs: int
    against: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `mhla compare`."""
    parser.usage = (
        "%(prog)s RECIPE (--over KEY=YAML-LIST ... | --variants FILE) [options] [--dotted.key VALUE ...]"
    )
    parser.add_argument("recipe", metavar="RECIPE", help="name of a packaged recipe, or path of a YAML file")
    parser.add_argument(
        "--over",
        action="append",
        default=[],
        metavar="KEY=YAML-LIST",
        help="a row for each value; several --over multiply",
    )
    parser.add_argument(
        "--variants",
        metavar="FILE",
        help="YAML mapping from a row's name to its dotted overrides, or a packaged one: language_quality",
    )
    parser.add_argument(
        "--seeds",
        metavar="N,N,...",
        help="train every row with each of these seeds (default: the recipe's one)",
    )
    parser.add_argument(
        "--against",
        metavar="ROW",
        help="row that the others are compared with, seed by seed (default: the first)",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="runs trained at once; they share the cores (default: %(default)s)",
    )
    parser.add_argument(
        "--eval",
        action="append",
        default=[],
        metavar="NAME",
        help=f"evaluation, or 'NAME: {{option: value}}' (YAML); names: {', '.join(EVALUATIONS)}",
    )
    parser.add_argument(
        "--runs",
        metavar="DIR",
        help="where the folder compare-HASH is made (default: $MHLA_RUNS, else ./runs)",
    )
    parser.add_argument("--json", metavar="FILE", help="write the table there too, as JSON")


def run(args: argparse.Namespace) -> int:
    """Carries out the verb; returns the exit code."""
    return perform(args, Console(width=None if sys.stdout.isatty() else _WIDE))[0]


def perform(args: argparse.Namespace, console: Console) -> tuple[int, Path]:
    """Train and measure all rows; return the exit code, and the folder of the comparison.

    Raises:
        UserError: an argument or a row is wrong.
    """
    wanted = _wanted(args)
    plan = wanted.plan
    if not all(folder.finished() for _, _, folder in plan.runs()):
        check_rows(plan)
    make_folder(plan.folder)
    with hold(plan.folder):
        try:
            code = _train(wanted, console)
            return code or _report(wanted, console, args.json, _measure(plan, console)), plan.folder
        except KeyboardInterrupt:
            print(
                "interrupted; finished runs and checkpoints are kept: the same command continues",
                file=sys.stderr,
            )
            return _INTERRUPTED, plan.folder


def _wanted(args: argparse.Namespace) -> _Wanted:
    check_json(args.json)
    demand_at_least(args, jobs=1)
    recipe = load_recipe(args.recipe)
    common = parse_overrides(args.overrides)
    if bool(args.over) == (args.variants is not None):
        raise UserError(
            "over" if args.over else None,
            "compare needs its rows in exactly one way: `over` KEY=YAML-LIST (once or several times) "
            "or `variants` FILE",
        )
    attention = ((recipe.values.get("model") or {}).get("init_args") or {}).get("attention")
    rows = rows_over(args.over, attention) if args.over else rows_from_file(variants_file(args.variants))
    if any("seed_everything" in overrides for overrides in (common, *(row.overrides for row in rows))):
        raise UserError(
            "seed_everything",
            "the seed is no override here; every row is trained with each of `seeds`, for example 0,1,2",
        )
    seeds = seed_list(args.seeds if args.seeds is not None else str(recipe.values.get("seed_everything", 0)))
    name = f"compare-{identity(flat(recipe.values, filled=False), rows, seeds, common)}"
    evaluations = [requested_evaluation(text, args.runs) for text in args.eval]
    for number, wanted in enumerate(evaluations):
        if wanted.name in [other.name for other in evaluations[:number]]:
            raise UserError("eval", f"{wanted.name} is given twice; the table has one column for its numbers")
    against = rows[0].name if args.against is None else args.against
    names = [row.name for row in rows]
    if against not in names:
        raise UserError("against", unknown_name("row", against, names))
    folder = runs_root(args.runs) / name
    return _Wanted(Comparison(recipe, rows, seeds, common, folder, evaluations), args.jobs, against)


def _train(wanted: _Wanted, console: Console) -> int:
    """Every run that is not finished; the exit code of the first that fails, else 0."""
    runs = wanted.plan.runs()
    names = {folder.path: (row, seed) for row, seed, folder in runs}
    reused = [folder.finished() for _, _, folder in runs]
    with _progress(console, len(runs)) as (progress, bar):
        for (row, seed, folder), before in zip(runs, reused, strict=True):
            if before:
                _say(progress.console, finished_line(row, seed, folder, True))

        def ended(child: ChildRun, code: int) -> None:
            row, seed = names[child.run.path]
            if code == 0 and child.run.finished():
                _say(progress.console, finished_line(row, seed, child.run, False))
            else:
                _say_failed(row, seed, child.log, code)

        children = [
            wanted.plan.child(row, seed)
            for (row, seed, _), before in zip(runs, reused, strict=True)
            if not before
        ]
        code = train_in_children(
            children, wanted.jobs, lambda done: progress.update(bar, completed=sum(reused) + done), ended
        )
    return code or int(not all(folder.finished() for _, _, folder in runs))


@contextmanager
def _progress(console: Console, total: int) -> Iterator[tuple[Progress, TaskID]]:
    """A bar over all runs; nothing where no terminal can draw it."""
    columns = (
        TextColumn("{task.completed:.1f}/{task.total:.0f} runs"),
        BarColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield progress, progress.add_task("", total=total)


def _say_failed(row: VariantRow, seed: int, log: Path, code: int) -> None:
    print(*log_end(log), sep="\n", file=sys.stderr)
    print(
        f"error: row '{row.name}', seed {seed} stopped with exit code {code}; all it said is in {log} "
        "(finished runs are kept: the same command continues)",
        file=sys.stderr,
    )


def _say(console: Console, line: str) -> None:
    """A line as it is: row names may hold brackets, and paths must not be broken."""
    console.print(Text(line), soft_wrap=True)


def _measure(plan: Comparison, console: Console) -> Measured:
    def on_measured(row: VariantRow, seed: int, name: str, found: Mapping[str, float], kept: bool) -> None:
        shown = ", ".join(f"{number} {value:.4g}" for number, value in found.items())
        _say(console, f"{row.name}, seed {seed}: {name}: {shown}{' (measured before)' if kept else ''}")

    return measure_runs(plan, on_measured)


def _report(wanted: _Wanted, console: Console, json_file: str | None, measured: Measured) -> int:
    from mhla_lightning.compare.curves import write_curves

    plan = wanted.plan
    rows = table_rows(plan, measured)
    logs = {row.name: [plan.log(row, seed) for seed in plan.seeds] for row in plan.rows}
    warnings = {name: [text for log in found for text in warnings_in(log)] for name, found in logs.items()}
    notes, tags = [*remarks(rows), *warned(warnings)], score_tags(rows)
    differences = list(paired_differences(rows, wanted.against, tags))
    table = {
        "format": FORMAT,
        "recipe": plan.recipe.name,
        "seeds": plan.seeds,
        "overrides": plan.common,
        "evaluations": {one.name: one.identity for one in plan.evaluations},
        "remarks": notes,
        "differences": as_json(differences),
        "rows": rows,
    }
    written = plan.folder / "table.json"
    for path in (written, *([Path(json_file)] if json_file is not None else [])):
        write_json(path, table)
    curves = {
        row.name: [read_metrics(plan.run(row, seed).metrics) for seed in plan.seeds] for row in plan.rows
    }
    seeds = f"seeds {', '.join(map(str, plan.seeds))}" if len(plan.seeds) > 1 else f"seed {plan.seeds[0]}"
    write_curves(plan.folder / "curves.png", f"{plan.recipe.name}, {seeds}", curves)
    print_table(console, f"{plan.recipe.name}, {seeds}", rows)
    paired = difference_table(rows, differences, headline(tags) or "")
    if paired is not None:
        console.print(paired)
    for line in notes:
        _say(console, f"note: {line}")
    _say(console, f"table:  {written}\ncurves: {plan.folder / 'curves.png'}")
    return 0


def print_table(console: Console, title: str, rows: list[dict[str, Any]]) -> None:
    """Print one line a row; a narrow terminal gets scores and costs in a table each."""
    scores, costs = score_tags(rows), list(COSTS)
    whole = rich_table(title, rows, scores, costs)
    if Measurement.get(console, console.options.update(width=_WIDE), whole).maximum <= console.width:
        console.print(whole)
    else:
        console.print(rich_table(title, rows, scores, []), rich_table(title, rows, [], costs))
