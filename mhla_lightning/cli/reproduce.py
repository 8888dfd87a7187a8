"""Decide the paper's claims at small scale, and write a page with the verdicts.

Each study trains or measures some rows with several seeds. Finished work is kept: the same command goes on
after a stop or a kill. Without a name all studies of the package are carried out.
  mhla reproduce --list                          # studies, their minutes, what is done
  mhla reproduce                                 # everything
  mhla reproduce classification language         # some
  mhla reproduce --budget 60                     # whole studies until 60 modelled minutes are used
  mhla reproduce --page-only                     # the page again, from what is there
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mhla_lightning.cli.output import demand_at_least, make_folder
from mhla_lightning.compare.variants import seed_list
from mhla_lightning.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from mhla_lightning.evidence.results import StudyResult
    from mhla_lightning.evidence.work import StudyWork

_PAGE = "evidence.md"
_WIDE = 160  # columns where no terminal limits them
_INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mhla reproduce`."""
    parser.add_argument(
        "table",
        nargs="*",
        metavar="TABLE",
        help="study of the package, or path of a YAML file (default: all)",
    )
    parser.add_argument(
        "--budget",
        type=float,
        metavar="MINUTES",
        help="whole studies in order of their value, as long as their modelled minutes fit",
    )
    parser.add_argument("--seeds", metavar="N,N,...", help="instead of the seeds of the studies")
    parser.add_argument(
        "--jobs", type=int, default=2, metavar="N", help="processes at once (default: %(default)s)"
    )
    parser.add_argument("--list", action="store_true", help="show the studies and train nothing")
    parser.add_argument("--page-only", action="store_true", help="write the page and train nothing")
    parser.add_argument(
        "--page",
        metavar="FILE",
        help="Markdown file to write; its pictures go to a folder of its name (default: docs/evidence.md in "
        "a checkout, else evidence.md among the runs)",
    )
    parser.add_argument("--runs", metavar="DIR", help="folder of all runs (default: $MHLA_RUNS, else ./runs)")


def run(args: argparse.Namespace) -> int:
    """Carry out the verb; return the exit code."""
    from rich.console import Console

    from mhla_lightning.evidence.study import read_studies
    from mhla_lightning.evidence.work import work_for

    demand_at_least(args, jobs=1)
    if args.budget is not None and not args.budget > 0:
        raise UserError("budget", f"{args.budget} is no number of minutes above 0")
    page = _page(args)
    seeds = None if args.seeds is None else seed_list(args.seeds)
    every = [work_for(study, seeds, args.runs) for study in read_studies(args.table)]
    console = Console(width=None if sys.stdout.isatty() else _WIDE)
    chosen = within(every, args.budget)
    if args.list:
        _print_list(console, every, chosen)
        return 0
    code = 0
    if not args.page_only:
        for one in every:
            if one not in chosen:
                _say(console, f"left out: {one.study.name}, {one.minutes_left():.0f} minutes")
        code = _carry_out(chosen, args.jobs, console)
    _write_page(_on_page(args, seeds, every), page, console)
    return code


def _on_page(args: argparse.Namespace, seeds: list[int] | None, every: list[StudyWork]) -> list[StudyWork]:
    """Return the studies of the page.

    They are all of the package, so that one study does not drop the others. A study of one's own has a page
    of its own.
    """
    from mhla_lightning.evidence.study import read_studies, study_names
    from mhla_lightning.evidence.work import work_for

    if not set(args.table) <= set(study_names()):
        return every
    return [work_for(study, seeds, args.runs) for study in read_studies([])]


def within(works: Sequence[StudyWork], budget: float | None) -> list[StudyWork]:
    """Return the studies that fit a budget, in their order.

    A smaller one may follow one that does not fit.

    Args:
        works: in the order of their value.
        budget: minutes; None takes all.
    """
    if budget is None:
        return list(works)
    chosen, used = [], 0.0
    for one in works:
        if used + one.minutes_left() <= budget:
            chosen.append(one)
            used += one.minutes_left()
    return chosen


def _page(args: argparse.Namespace) -> Path:
    """Return the file of the page, before any work. Raises UserError where it cannot be written."""
    from mhla_lightning.evidence.work import FOLDER
    from mhla_lightning.runs.folder import check_folder, runs_root

    if args.page is not None:
        page = Path(args.page)
        if page.suffix != ".md" or page.is_dir():
            raise UserError("page", f"{args.page} is no file name that ends in .md")
        check_folder("page", page.parent)
        return page
    here = Path.cwd()
    checkout = all((here / name).exists() for name in ("mhla_lightning", "docs", "mkdocs.yml"))
    return here / "docs" / _PAGE if checkout else runs_root(args.runs) / FOLDER / _PAGE


def _print_list(console: Console, every: Sequence[StudyWork], chosen: Sequence[StudyWork]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(caption="minutes are modelled, on two quiet cores")
    for heading in ("study", "title", "claims", "minutes", "left", "done", "within the budget"):
        table.add_column(heading, justify="left" if heading in ("study", "title") else "right")
    for one in every:
        done, units = one.units()
        state = "complete" if one.complete() else f"{done} of {units} runs"
        cells = [one.study.name, one.study.title, str(len(one.study.claims)), f"{one.study.minutes:g}"]
        fits = "yes" if one in chosen else "no"
        table.add_row(*map(Text, [*cells, f"{one.minutes_left():.0f}", state, fits]))
    console.print(table)
    total = sum(one.minutes_left() for one in every)
    _say(console, f"{total:.0f} minutes are left; `mhla reproduce` does all")


def _carry_out(works: Sequence[StudyWork], jobs: int, console: Console) -> int:
    """Do the studies one after the other; return the exit code."""
    from mhla_lightning.evidence.running import Reporter, carry_out

    failures: list[str] = []
    for number, work in enumerate(works):
        later = sum(one.minutes_left() for one in works[number + 1 :])
        with _Bar(console, work, later) as bar:
            reporter = Reporter(lambda line: _say(console, line), _complain, bar.update)
            try:
                outcome = carry_out(work, jobs, reporter)
            except UserError as error:
                if len(works) == 1:
                    raise
                failures.append(f"{work.study.name}: {error}")
                continue
            except KeyboardInterrupt:
                _complain(["interrupted; finished runs and checkpoints are kept: the same command continues"])
                return _INTERRUPTED
        failures += [f"{work.study.name}: {line}" for line in outcome.failures]
        if outcome.stopped:
            _complain([f"stopped in {work.study.name}; the same command continues"])
            return outcome.stopped
    if failures:
        _complain(
            [f"{len(failures)} failed; the others are done, and the same command tries again:", *failures]
        )
    return int(bool(failures))


class _Bar:
    """A bar of a study with the minutes that are left, by the pace of this start."""

    def __init__(self, console: Console, work: StudyWork, later: float) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[left]}"))
        self.progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.bar = self.progress.add_task(work.study.name, total=1.0, left="")
        self.work, self.later = work, later
        done, units = work.units()
        self.before, self.began = done / units, time.monotonic()

    def __enter__(self) -> _Bar:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def update(self, what: str, share: float | None) -> None:
        """Show the work and the share of the study's runs that is done; None after the runs."""
        left = "runs finished"
        if share is not None:
            seconds = time.monotonic() - self.began
            minutes = minutes_left(self.work.study.minutes, self.before, share, seconds)
            left = f"{share:.0%}, about {minutes:.0f} minutes left"
        if self.later:
            left += f", then {self.later:.0f} for the next studies"
        title = f"{self.work.study.name}: {what}"
        self.progress.update(self.bar, completed=1 if share is None else share, left=left, description=title)


def minutes_left(modelled: float, before: float, share: float, seconds: float) -> float:
    """Return the minutes of a study that are left, by the measured pace once there is one.

    Args:
        modelled: minutes of the whole study.
        before, share: shares that were done at the start and are done now.
        seconds: since the start.
    """
    if share - before < 0.02:
        return modelled * (1 - share)
    return seconds / 60 * (1 - share) / (share - before)


def _write_page(works: Sequence[StudyWork], page: Path, console: Console) -> None:
    from mhla_lightning.evidence.page import write_page
    from mhla_lightning.evidence.results import read_result

    results = [read_result(work) for work in works]
    make_folder("page", page.parent)
    files = write_page(page, results)
    _print_verdicts(console, results)
    _say(console, f"page: {files[0]}")


def _print_verdicts(console: Console, results: Sequence[StudyResult]) -> None:
    from rich.table import Table
    from rich.text import Text

    from mhla_lightning.evidence.page import number_of

    table = Table()
    for heading in ("study", "claim", "here", "verdict"):
        table.add_column(heading, overflow="fold")
    for result in results:
        for claim, verdict in result.verdicts:
            here = number_of(claim, verdict, result.work.study.metrics)
            table.add_row(*map(Text, (result.work.study.name, claim.says, here, verdict.answer)))
    console.print(table)


def _say(console: Console, line: str) -> None:
    """Print a line as it is: row names may hold brackets, and paths must not be broken."""
    from rich.text import Text

    console.print(Text(line), soft_wrap=True)


def _complain(lines: Sequence[str]) -> None:
    print(*lines, sep="\n", file=sys.stderr)
