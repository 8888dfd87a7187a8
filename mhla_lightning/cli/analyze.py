"""Look into the attention of runs: rank, entropy, locality and maps, by layer and head.

The numbers are means over held-out samples of each run. Several runs share a table and a page of plots.
Packed rows of text count with their longest document. The page is analysis.png, all numbers are in
analysis.json.
  mhla analyze my_run
  mhla analyze linear_run softmax_run mhla_run --samples 16 --to looked_into
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mhla_lightning.cli.output import (
    check_json,
    demand_at_least,
    folder_named_after,
    make_folder,
    measuring_bar,
    write_json,
)
from mhla_lightning.cli.trained import add_trained_arguments
from mhla_lightning.errors import UserError
from mhla_lightning.runs.folder import check_folder

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from rich.table import Table

    from mhla_lightning.analysis.drawing import DrawnRun
    from mhla_lightning.analysis.held_out import TrainedRun
    from mhla_lightning.analysis.study import ModelStudy, StudyOptions

FORMAT = 1
_WIDE = 200  # columns where no terminal limits them


@dataclass(frozen=True)
class LookedInto:
    """The result of the verb.

    Attributes:
        result: as in analysis.json.
        picture: the page of plots.
        studies: by the run's name.
    """

    result: dict[str, Any]
    picture: Path
    studies: dict[str, ModelStudy]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mhla analyze`."""
    add_trained_arguments(parser, several=True)
    parser.add_argument(
        "--to", metavar="FOLDER", help="folder to write to (default: analysis- and the run's name)"
    )
    parser.add_argument(
        "--samples", type=int, default=8, metavar="N", help="held-out samples (default: %(default)s)"
    )
    parser.add_argument(
        "--queries",
        type=int,
        nargs="+",
        metavar="TOKEN",
        help="tokens of the first sample whose maps are drawn, in raster order from 0 on (default: three)",
    )
    parser.add_argument(
        "--block-size",
        type=int,
        nargs="+",
        metavar="N",
        help="tokens a block per axis, for the share of the own block (default: that of the first layer with "
        "blocks in any of the runs, else a quarter of each axis, or a 16th of a row)",
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=4096,
        metavar="N",
        help="most tokens of a sample; a matrix of their square is made for each head (default: %(default)s)",
    )
    parser.add_argument("--heads", action="store_true", help="a line a head (default: a line a layer)")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there too")


def run(args: argparse.Namespace) -> int:
    """Carry out the verb; return the exit code."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else _WIDE)
    done = perform(args, console)
    console.print(numbers_table(done.studies, args.heads))
    for line in skipped_lines(done.studies):
        console.print(f"skipped: {line}", markup=False, highlight=False, soft_wrap=True)
    console.print(
        f"plots:   {done.picture}\nnumbers: {done.picture.with_suffix('.json')}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    return 0


def perform(args: argparse.Namespace, console: Console) -> LookedInto:
    """Look into all runs and write the page and the numbers.

    Raises:
        UserError: an argument or a run is wrong.
    """
    check_json(args.json)
    demand_at_least(args, samples=1, max_tokens=1)
    for number in args.block_size or ():
        if number < 1:
            raise UserError("block_size", f"found {number}; a block has at least 1 token per axis")
    folder = None if args.to is None else check_folder("to", args.to)
    from mhla_lightning.analysis.drawing import write_page
    from mhla_lightning.analysis.held_out import open_run
    from mhla_lightning.inference.weights import choose_device

    device = choose_device(args.device)
    opened = [
        open_run(name, args.samples, runs=args.runs, ckpt=args.ckpt, ema=not args.no_ema) for name in args.run
    ]
    folder = folder or check_folder("to", folder_named_after("analysis", [one.run.run_id for one in opened]))
    options = _options(args, opened)
    drawn: list[DrawnRun] = []
    with measuring_bar(console, len(opened)) as measuring:
        for one, name in zip(opened, _names(opened), strict=True):
            measuring(name)
            drawn.append(_look(one, name, options, device))
    studies = {one.name: one.study for one in drawn}
    runs = [_as_json(one, found) for one, found in zip(opened, drawn, strict=True)]
    result = {"format": FORMAT, "samples": args.samples, "runs": runs}
    make_folder("to", folder)
    write_page(folder / "analysis.png", drawn)
    for path in (str(folder / "analysis.json"), args.json):
        write_json(path, result)
    return LookedInto(result, folder / "analysis.png", studies)


def _names(opened: list[TrainedRun]) -> list[str]:
    """Return a name of each run that no other has."""
    names = [one.run.run_id for one in opened]
    return [
        f"{one.run.path.parent.name}/{name}" if names.count(name) > 1 else name
        for one, name in zip(opened, names, strict=True)
    ]


def _options(args: argparse.Namespace, opened: list[TrainedRun]) -> StudyOptions:
    """Return what is looked at: blocks are the same in all runs of one grid.

    Raises:
        UserError: a run is named twice, or its samples are too large.
    """
    from mhla_lightning.analysis.study import StudyOptions, block_size_of, check_tokens

    paths = [one.run.path.resolve() for one in opened]
    if len(set(paths)) < len(paths):
        raise UserError("run", "a run is named twice; name each once")
    shared = None
    grids = {tuple(one.task.grid) for one in opened}
    if args.block_size is None and len(grids) == 1:
        shared = block_size_of((part for one in opened for part in one.block_sizes()), next(iter(grids)))
    options = StudyOptions(args.block_size, shared, args.queries, args.max_tokens)
    for one in opened:
        tokens = 1
        for count in one.task.grid:
            tokens *= count
        check_tokens(tokens, options)
    return options


def _look(one: TrainedRun, name: str, options: StudyOptions, device: torch.device) -> DrawnRun:
    from mhla_lightning.analysis.drawing import DrawnRun
    from mhla_lightning.analysis.held_out import single_samples
    from mhla_lightning.analysis.pictures import sample_pixels, sample_text
    from mhla_lightning.analysis.study import study

    batch = one.batch()
    task = one.load(device)
    samples = list(single_samples(task.completed(batch, 0, "evaluate"), device))
    found = study(task, samples, options)
    task.to("cpu")
    assert found.shown is not None
    return DrawnRun(
        name, found, sample_pixels(task, samples[0]), sample_text(one.run, samples[0], found.shown)
    )


def _as_json(one: TrainedRun, drawn: DrawnRun) -> dict[str, Any]:
    found = drawn.study
    layers = [
        {
            "layer": number,
            "attention": dict(layer.attention),
            "tokens": layer.tokens,
            "block_size": layer.block_size,
            "rank_bound": layer.rank_bound,
            "skipped": layer.skipped,
            "mean": {name: _number(float(heads.mean())) for name, heads in layer.heads.items()},
            "heads": {name: [_number(x) for x in heads.tolist()] for name, heads in layer.heads.items()},
        }
        for number, layer in enumerate(found.layers)
    ]
    facts = {"samples": found.samples, "tokens": found.tokens, "grid": found.grid, "queries": found.queries}
    return {**one.identity(), "name": drawn.name, **facts, "layers": layers}


def _number(value: float) -> float | None:
    """Return a number that JSON has."""
    return value if value == value else None


def numbers_table(studies: dict[str, ModelStudy], heads: bool) -> Table:
    """Return the numbers, a line a layer or a line a head."""
    from rich.table import Table
    from rich.text import Text

    from mhla_lightning.analysis.measures import TITLES

    measures = [name for name in TITLES if name not in ("distance", "empty_rows")]
    table = Table(caption=None if heads else "means over heads; --heads shows each")
    for heading in ("run", "layer", "attention"):
        table.add_column(heading, overflow="fold")
    for heading in (
        "tokens",
        *(["head"] if heads else []),
        "rank bound",
        *(TITLES[name] for name in measures),
    ):
        table.add_column(heading, justify="right")
    for name, found in studies.items():
        for number, layer in enumerate(found.layers):
            if not layer.heads:
                continue
            bound = "-" if layer.rank_bound is None else str(layer.rank_bound)
            count = len(layer.heads["rank"])
            lines = [slice(head, head + 1) for head in range(count)] if heads else [slice(None)]
            for head, line in enumerate(lines):
                values = [_shown(measure, float(layer.heads[measure][line].mean())) for measure in measures]
                place = [str(head)] if heads else []
                cells = [
                    name,
                    str(number),
                    layer.attention["name"],
                    f"{layer.tokens:.0f}",
                    *place,
                    bound,
                    *values,
                ]
                table.add_row(*map(Text, cells))
        table.add_section()
    return table


def _shown(measure: str, value: float) -> str:
    return f"{value:.1f}" if "rank" in measure else f"{value:.3f}"


def skipped_lines(studies: dict[str, ModelStudy]) -> list[str]:
    """Return a line for every layer without numbers, and one for those that read a text by MHLA."""
    layers = [
        f"{name}, layer {number}: {layer.skipped}"
        for name, found in studies.items()
        for number, layer in enumerate(found.layers)
        if layer.skipped is not None
    ]
    return layers + [
        f"{name}, {found.reading} layers of cross_attention mhla: only self-attention is measured"
        for name, found in studies.items()
        if found.reading
    ]
