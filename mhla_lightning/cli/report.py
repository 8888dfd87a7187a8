"""Write one HTML page about runs, side by side, or about a comparison.

RUN is a run id, a run folder, a SLURM job id, or a folder that `mhla compare` wrote.
A run may still be going.
The page holds everything: it opens from disk, without a server or a network.
  mhla report my_run                             # writes report-my_run/index.html
  mhla report my_run my_other_run --to page      # curves in one plot
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mhla_lightning.cli.output import folder_named_after, make_folder
from mhla_lightning.errors import UserError
from mhla_lightning.runs.folder import check_folder, find_runs, replacing, runs_root

_MOST_RUNS = 24
_FILE = "index.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mhla report`."""
    parser.add_argument(
        "run", nargs="+", metavar="RUN", help="run id, run folder, SLURM job id, or folder of a comparison"
    )
    parser.add_argument(
        "--to", metavar="FOLDER", help=f"folder to write {_FILE} to (default: report- and the run's name)"
    )
    parser.add_argument("--runs", metavar="DIR", help="folder of all runs (default: $MHLA_RUNS, else ./runs)")


def run(args: argparse.Namespace) -> int:
    """Write the page; return the exit code."""
    from mhla_lightning import __version__
    from mhla_lightning.report.comparison import read_comparison
    from mhla_lightning.report.page import comparison_page, run_page
    from mhla_lightning.report.run import read_run

    target = None if args.to is None else check_folder("to", args.to)
    root = runs_root(args.runs)
    compared = [folder for name in args.run if (folder := _comparison(name, root)) is not None]
    if compared:
        if len(args.run) > 1:
            raise UserError(
                "run", f"{compared[0]} is a comparison, which has a page of its own; name it alone"
            )
        page, names = comparison_page(read_comparison(compared[0])), [compared[0].name]
    else:
        folders = _run_folders(args.run, root)
        page = run_page([read_run(folder) for folder in folders], _names(folders))
        names = [folder.name for folder in folders]
    target = target or check_folder("to", folder_named_after("report", names))
    text = page.html(__version__)
    make_folder("to", target)
    with replacing(target / _FILE) as file:
        file.write_text(text, encoding="utf-8", errors="replace")
    print(f"report: {target / _FILE} ({len(text) / 1e6:.1f} MB); open it in a browser")
    for note in page.notes:
        print(f"  {note}")
    return 0


def _comparison(name: str, root: Path) -> Path | None:
    """Return the folder of a comparison; None for anything else.

    Raises:
        UserError: a comparison that has not ended.
    """
    for folder in (root / name, Path(name)):
        if (folder / "table.json").is_file():
            return folder.resolve()
        if folder.name.startswith("compare-") and folder.is_dir() and not (folder / "recipe.yaml").is_file():
            raise UserError(
                "run",
                f"{folder} has no table.json yet: the comparison has not ended; name the folders of its runs",
            )
    return None


def _run_folders(names: list[str], root: Path) -> list[Path]:
    folders = list(dict.fromkeys(one.path for name in names for one in find_runs(name, root)))
    if len(folders) > _MOST_RUNS:
        raise UserError("run", f"{len(folders)} runs do not fit one page; name at most {_MOST_RUNS}")
    return folders


def _names(folders: list[Path]) -> list[str]:
    """Return the name of each run; those of one name get the folder that holds them."""
    names = [folder.name for folder in folders]
    return [
        str(Path(folder.parent.name, folder.name)) if names.count(folder.name) > 1 else folder.name
        for folder in folders
    ]
