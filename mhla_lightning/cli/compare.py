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
from collections.abc import Iterator
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
from mhla_lightning.compare.comparison import COSTS, headline, rich_table, score_tags, table_row
from mhla_lightning.compare.fairness import remarks, warned
from mhla_lightning.compare.significance import as_json, difference_table, paired_differences
from mhla_lightning.compare.variants import (
    VariantRow,
    arguments,
    identity,
    merged,
    rows_from_file,
    rows_over,
    seed_list,
)
from mhla_lightning.config.moved_keys import flat
from mhla_lightning.config.recipes import Recipe, apply_overrides, load_recipe, parse_overrides, variants_file
from mhla_lightning.errors import UserError, unknown_name
from mhla_lightning.evaluation import EVALUATIONS, RequestedEvaluation, requested_evaluation
from mhla_lightning.runs.folder import (
    FORMAT,
    RunFolder,
    check_run_id,
    read_metrics,
    read_object,
    runs_root,
    write_json,
)
from mhla_lightning.runs.lock import hold

TAKES_OVERRIDES = True
_LOG_LINES = 15
_INTERRUPTED = 130  # what a shell reports for Ctrl-C
_WIDE = 240  # columns where no terminal limits them


@dataclass(frozen=True)
class Comparison:
    """What to train.

    Args:
        recipe: as written.
        rows, seeds: every pair is a run.
        common: overrides of all rows.
        folder: holds the runs, their logs, table.json and curves.png.
        jobs: runs trained at once.
        evaluations: run on every finished run.
        against: name of the row that the others are compared with, seed by seed.
    """

    recipe: Recipe
    rows: list[VariantRow]
    seeds: list[int]
    common: dict[str, Any]
    folder: Path
    jobs: int
    evaluations: list[RequestedEvaluation]
    against: str

    def runs(self) -> list[tuple[VariantRow, int, RunFolder]]:
        return [(row, seed, self.run(row, seed)) for row in self.rows for seed in self.seeds]

    def run(self, row: VariantRow, seed: int) -> RunFolder:
        return RunFolder(self.folder / check_run_id(row.run_id(seed)))

    def values(self, row: VariantRow) -> dict[str, Any]:
        return merged(self.common, row.overrides)


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
    plan = _plan(args)
    if not all(folder.finished() for _, _, folder in plan.runs()):
        _check_rows(plan)
    _make(plan.folder)
    with hold(plan.folder):
        try:
            code = _train(plan, console)
            return code or _report(plan, console, args.json, _measure(plan, console)), plan.folder
        except KeyboardInterrupt:
            print(
                "interrupted; finished runs and checkpoints are kept: the same command continues",
                file=sys.stderr,
            )
            return _INTERRUPTED, plan.folder


def _plan(args: argparse.Namespace) -> Comparison:
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
    return Comparison(recipe, rows, seeds, common, folder, args.jobs, evaluations, against)


def _check_rows(plan: Comparison) -> None:
    """A typo in the last row shows before the first row has trained for hours."""
    from mhla_lightning.config.resolve import resolve

    for row in plan.rows:
        try:
            resolved = resolve(apply_overrides(plan.recipe.values, plan.values(row)))
            for wanted in plan.evaluations:
                wanted.check(resolved.task, resolved.data)
        except UserError as error:
            raise UserError(error.key, f"row '{row.name}': {error.reason}") from error


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            str(folder), f"cannot write: {error.strerror}; choose another place with `runs` or $MHLA_RUNS"
        ) from error


def _train(plan: Comparison, console: Console) -> int:
    """Every run that is not finished; the exit code of the first that fails, else 0."""
    runs = plan.runs()
    names = {folder.path: (row, seed) for row, seed, folder in runs}
    reused = [folder.finished() for _, _, folder in runs]
    with _progress(console, len(runs)) as (progress, bar):
        for (row, seed, folder), before in zip(runs, reused, strict=True):
            if before:
                _say(progress.console, _finished_line(row, seed, folder, True))

        def ended(child: ChildRun, code: int) -> None:
            row, seed = names[child.run.path]
            if code == 0 and child.run.finished():
                _say(progress.console, _finished_line(row, seed, child.run, False))
            else:
                _say_failed(row, seed, child.log, code)

        children = [
            _child(plan, row, seed, folder)
            for (row, seed, folder), before in zip(runs, reused, strict=True)
            if not before
        ]
        code = train_in_children(
            children, plan.jobs, lambda done: progress.update(bar, completed=sum(reused) + done), ended
        )
    return code or int(not all(folder.finished() for _, _, folder in runs))


def _child(plan: Comparison, row: VariantRow, seed: int, folder: RunFolder) -> ChildRun:
    words = arguments({"seed_everything": seed, **plan.values(row)})
    return ChildRun(str(plan.recipe.path), folder, words, _log(plan, row, seed))


def _log(plan: Comparison, row: VariantRow, seed: int) -> Path:
    """Return the file of all that the run of a row and a seed says."""
    return plan.folder / f"{plan.run(row, seed).run_id}.log"


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
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:]
    print(*lines, sep="\n", file=sys.stderr)
    print(
        f"error: row '{row.name}', seed {seed} stopped with exit code {code}; all it said is in {log} "
        "(finished runs are kept: the same command continues)",
        file=sys.stderr,
    )


def _finished_line(row: VariantRow, seed: int, folder: RunFolder, reused: bool) -> str:
    summary = read_object(folder.summary)
    tag = headline(summary["last"])
    value = f"{tag} {summary['last'][tag]:.4f}, " if tag else ""
    return f"{row.name}, seed {seed}: {value}{summary['seconds']:.1f} s" + (
        " (finished before)" if reused else ""
    )


def _say(console: Console, line: str) -> None:
    """A line as it is: row names may hold brackets, and paths must not be broken."""
    console.print(Text(line), soft_wrap=True)


Measured = dict[int, dict[str, dict[str, float]]]
"""seed -> name of an evaluation -> numbers"""


def _measure(plan: Comparison, console: Console) -> dict[str, Measured]:
    """Return the evaluations of every run by the row's name; earlier ones are read."""
    measured: dict[str, Measured] = {row.name: {seed: {} for seed in plan.seeds} for row in plan.rows}
    for wanted in plan.evaluations:
        for row, seed, folder in plan.runs():
            kept = wanted.kept(folder)
            try:
                found = kept if kept is not None else wanted.measure(folder)
            except UserError as error:
                raise UserError(error.key, f"row '{row.name}', seed {seed}: {error.reason}") from error
            shown = ", ".join(f"{number} {value:.4g}" for number, value in found.items())
            _say(
                console,
                f"{row.name}, seed {seed}: {wanted.name}: "
                f"{shown}{' (measured before)' if kept is not None else ''}",
            )
            measured[row.name][seed][wanted.name] = found
    return measured


def _report(plan: Comparison, console: Console, json_file: str | None, measured: dict[str, Measured]) -> int:
    from mhla_lightning.compare.curves import write_curves

    summaries = {
        row.name: {seed: read_object(plan.run(row, seed).summary) for seed in plan.seeds} for row in plan.rows
    }
    rows = [table_row(row.name, row.overrides, summaries[row.name], measured[row.name]) for row in plan.rows]
    logs = {row.name: [_log(plan, row, seed) for seed in plan.seeds] for row in plan.rows}
    warnings = {name: [text for log in found for text in warnings_in(log)] for name, found in logs.items()}
    notes, tags = [*remarks(rows), *warned(warnings)], score_tags(rows)
    differences = list(paired_differences(rows, plan.against, tags))
    evaluations = {wanted.name: wanted.identity for wanted in plan.evaluations}
    table = {
        "format": FORMAT,
        "recipe": plan.recipe.name,
        "seeds": plan.seeds,
        "overrides": plan.common,
        "evaluations": evaluations,
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
