"""Measure the data pipeline beside the decoder alone, webdataset and a numpy memmap."""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mhla_lightning.cli.output import demand_at_least, load, summary_table, write_json
from mhla_lightning.errors import UserError

if TYPE_CHECKING:
    from mhla_lightning.bench.data_speed import DataCase, LoaderPlan
    from mhla_lightning.data.modules.base import ShardDataModule

HELP = "the training stream beside the bare decoder, webdataset and numpy's memmap"
EXAMPLE = "--samples 500 --workers 1"
IMAGE_SIDE = 256  # pixels of the images that are made
AUGMENTED, CROPPED, TOKENS = "images, DeiT", "images, crop", "tokens"
_PACKAGES = ("torch", "torchvision", "timm", "pillow", "webdataset", "numpy")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `mhla bench data`."""
    parser.add_argument(
        "--path",
        metavar="DIR",
        help="image shards of this machine (default: JPEG images of random content are made)",
    )
    parser.add_argument(
        "--images",
        type=int,
        default=2000,
        help=f"how many are made, {IMAGE_SIDE} x {IMAGE_SIDE} pixels (default: %(default)s)",
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=1024,
        help="images that every case reads in a turn (default: %(default)s)",
    )
    parser.add_argument(
        "--image-size", type=int, default=224, help="after the random crop (default: %(default)s)"
    )
    parser.add_argument(
        "--rows",
        type=int,
        default=32768,
        help="token rows that are made and that every case reads in a turn (default: %(default)s)",
    )
    parser.add_argument("--length", type=int, default=1024, help="tokens a row (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="default: %(default)s")
    parser.add_argument(
        "--workers",
        type=int,
        default=2,
        help="loader processes of every case; 0 loads in this one (default: %(default)s)",
    )
    parser.add_argument(
        "--turns",
        type=int,
        default=9,
        help="measured turns after a warm-up, at least 5 (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Carries out the verb."""
    demand_at_least(args, turns=5, batch=1, workers=0, image_size=1, images=1, length=2)
    import torch
    from rich.console import Console
    from rich.progress import Progress

    from mhla_lightning.bench.data_speed import take_turns

    cases: list[DataCase] = []
    with tempfile.TemporaryDirectory(prefix="mhla-bench-") as folder, Progress(transient=True) as progress:
        bar = progress.add_task("measuring", total=8 * (args.turns + 1))
        for group in _groups(args, Path(folder)):
            take_turns(group, lambda: progress.advance(bar))
            cases += group
    result = {"rows": [case.row() for case in cases], "summary": _summary(cases)}
    versions = {"python": platform.python_version()} | {name: version(name) for name in _PACKAGES}
    threads = "1 thread each" if args.workers else f"{torch.get_num_threads()} threads"
    machine = f"{os.cpu_count()} cores, {args.workers} workers ({threads}), {load()}"
    console = Console()
    console.print(f"{machine}; {', '.join(f'{name} {number}' for name, number in versions.items())}")
    for table in _tables(result):
        console.print(table)
    write_json(
        args.json,
        {**result, "machine": machine, "versions": versions, "batch": args.batch, "workers": args.workers},
    )
    return 0


def _groups(args: argparse.Namespace, folder: Path) -> Iterator[list[DataCase]]:
    """The cases that take turns with each other; the loaders of one group at a time."""
    from mhla_lightning.bench.data_samples import write_images, write_tokens
    from mhla_lightning.bench.data_speed import make_case, memmap_loop, own_stream
    from mhla_lightning.data.modules.options import OrderConfig
    from mhla_lightning.data.modules.tokens import TokenDataModule
    from mhla_lightning.data.transforms import Augmentation

    images, plan = _plan(args, "samples"), _plan(args, "rows")
    path = _image_folder(args.path) if args.path else write_images(folder / "images", args.images, IMAGE_SIDE)
    yield _image_cases(path, AUGMENTED, Augmentation(), args.image_size, images)
    cropped = Augmentation(hflip=0.0, color_jitter=None, auto_augment=None, re_prob=0.0)
    yield _image_cases(path, CROPPED, cropped, args.image_size, images)
    files = write_tokens(folder / "tokens", args.rows, args.length)
    module = TokenDataModule(str(files.split.parent), args.batch, order=OrderConfig(seed=0))
    yield [
        make_case(TOKENS, "stream", plan, own_stream(module.corpus, module.kind(module.index()), plan)),
        make_case(TOKENS, "memmap", plan, memmap_loop(module.corpus, plan, files)),
    ]


def _image_cases(path: Path, subject: str, augmentation: Any, size: int, plan: LoaderPlan) -> list[DataCase]:
    from mhla_lightning.bench.data_speed import decoder_loop, make_case, own_stream, webdataset_pipeline
    from mhla_lightning.data.modules.images import ImageDataModule
    from mhla_lightning.data.modules.options import OrderConfig

    module: ShardDataModule = ImageDataModule(
        str(path), plan.batch_size, image_size=size, augmentation=augmentation, order=OrderConfig(seed=0)
    )
    index = module.index()
    kind = module.kind(index)
    kind.check(index, str(path))
    if len(index.shards) < plan.workers:
        raise UserError(
            "workers",
            f"{plan.workers} are too many: {path} has {len(index.shards)} training shards, and "
            "webdataset needs one for every worker",
        )
    return [
        make_case(subject, "stream", plan, own_stream(module.corpus, kind, plan)),
        make_case(subject, "decoder", plan, decoder_loop(module.corpus, kind, plan)),
        make_case(
            subject,
            "webdataset",
            plan,
            webdataset_pipeline(path / "train", [shard.name for shard in index.shards], kind, plan),
        ),
    ]


def _plan(args: argparse.Namespace, name: str) -> LoaderPlan:
    from mhla_lightning.bench.data_speed import WARM_UP, LoaderPlan

    workers = max(1, args.workers)
    demand_at_least(args, **{name: 2 * WARM_UP * args.batch * workers})
    return LoaderPlan(args.batch, getattr(args, name) // (args.batch * workers), args.workers, args.turns)


def _image_folder(path: str) -> Path:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UserError("path", f"{path} is no folder of this machine")
    return folder


def _summary(cases: Sequence[DataCase]) -> dict[str, float]:
    from mhla_lightning.bench.timing import ratio

    rates = {(case.subject, case.name): case.rates for case in cases}
    pairs = {
        "stream_over_decoder": (AUGMENTED, "decoder"),
        "stream_over_webdataset": (AUGMENTED, "webdataset"),
        "stream_over_decoder_crop": (CROPPED, "decoder"),
        "stream_over_webdataset_crop": (CROPPED, "webdataset"),
        "tokens_over_memmap": (TOKENS, "memmap"),
    }
    return {
        key: ratio(rates[subject, "stream"], rates[subject, other]) for key, (subject, other) in pairs.items()
    }


def _tables(result: dict[str, Any]) -> list[Any]:
    from rich.table import Table

    table = Table(
        title="samples/s: median and range of the turns; DeiT: its augmentation, crop: random crop only"
    )
    for heading in ("subject", "case", "samples/s", "range", "samples a turn", "turns"):
        table.add_column(heading, justify="left" if heading in ("subject", "case") else "right")
    for row in result["rows"]:
        span = f"{row['slowest']:,.0f} - {row['fastest']:,.0f}"
        table.add_row(
            row["subject"],
            row["case"],
            f"{row['samples_per_second']:,.0f}",
            span,
            f"{row['samples_a_turn']:,}",
            f"{row['turns']}",
        )
    return [table, summary_table("samples/s of the stream / of the other", result["summary"])]
