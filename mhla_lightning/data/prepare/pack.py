"""Sources to shards.

The same source and options give the same bytes, with any number of workers and however often the work was
interrupted.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

from mhla_lightning import __version__
from mhla_lightning.data.index import SPLITS, VAE, ShardEntry, ShardIndex
from mhla_lightning.data.prepare.parallel import check_workers, run_jobs
from mhla_lightning.data.prepare.replacing import Building, Note, build, demand_free
from mhla_lightning.data.prepare.samples import Sample
from mhla_lightning.data.prepare.shards import SHARD_BYTES, shard_name
from mhla_lightning.data.prepare.sources import SampleSource, SourcePart, open_sample_source
from mhla_lightning.data.prepare.tallies import Done, finished_shard, write_tallied
from mhla_lightning.data.stores.addresses import parse
from mhla_lightning.errors import DataError, UserError

Progress = Callable[[str, int, int], None]  # split, samples done, samples in all
DEFAULT_VAL = 0.2  # share held out when the source has no val part and none is asked for
# Few enough samples a shard that small sets can still be dealt over ranks x workers.
_FEWEST_SHARDS = {"train": 16, "val": 4, "test": 4}
_PROBED = 64  # samples read to estimate the size of a split
_WRITERS = ("numpy", "pillow", "webdataset")  # another version of one of them may write other bytes
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PackOptions:
    """The choices that decide, with the source, which bytes are written.

    Args:
        val: samples (int) or share (float below 1) held out for validation, for a source without a val part;
            None is 0.2.
        shards: number of training shards; None takes enough for 512 MB each, at least 16.
        seed: of the order and of the held-out part.
        kind: images, latents or video_latents; see sources.open_sample_source.
        vae: what made the latents; None for images.
    """

    val: int | float | None = None
    shards: int | None = None
    seed: int = 0
    kind: str = "images"
    vae: VAE | None = None

    def __post_init__(self) -> None:
        """Raise UserError for a number of shards below 1."""
        if self.shards is not None and self.shards < 1:
            raise UserError("shards", f"is {self.shards}; it must be at least 1")


@dataclass(frozen=True)
class PlannedSplit:
    """The samples of a split in the order of writing.

    Args:
        name: train, val or test.
        part: of the source.
        order: positions in the part.
        shards: number of shards to write.
    """

    name: str
    part: SourcePart
    order: list[int]
    shards: int

    def start(self, shard: int) -> int:
        """Return the index in the split of the first sample of shard number `shard`."""
        return len(self.order) * shard // self.shards


@dataclass(frozen=True)
class PackJob:
    """One shard to write, in any process."""

    building: Building
    split: str
    name: str
    kind: str
    samples: Iterable[Sample]
    first: int


@dataclass
class PackTally:
    """Samples of a shard by their remarks."""

    remarks: dict[str, int] = field(default_factory=dict)

    def counted(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        """Pass samples on and count their remarks."""
        for sample in samples:
            for remark in sample.remarks:
                self.remarks[remark] = self.remarks.get(remark, 0) + 1
            yield sample


def pack(
    source: str | Path | SampleSource,
    to: str | Path,
    options: PackOptions | None = None,
    *,
    overwrite: bool = False,
    workers: int = 1,
    wait: bool = True,
    on_progress: Progress | None = None,
    on_note: Note | None = None,
) -> dict[str, ShardIndex]:
    """Write `source` as shards under `to`, in an order shuffled by the seed.

    Args:
        source: see sources.open_sample_source.
        to: the folder to make.
        options: None takes the defaults of PackOptions.
        overwrite: replace `to` if it holds shards.
        workers: processes, each of which writes whole shards; 1 is this process.
        wait: wait for another process that packs into `to`; False refuses.
        on_progress: called with a split, its samples done and its samples in all.
        on_note: called with remarks for the user, such as that finished shards are kept; None logs them.

    Returns:
        The index of every split.

    Raises:
        UserError: a bad argument, or a target in use.
        DataError: a bad source.
        Interrupted: work that the same call can continue.
    """
    options, target = options or PackOptions(), check_target(source, to)
    check_workers(workers)
    demand_free(target, overwrite)
    opened = (
        source if isinstance(source, SampleSource) else open_sample_source(source, options.kind, options.vae)
    )
    splits = plan(opened, options)
    note = on_note or _log.info
    with build(
        target, _fingerprint(source, opened, options), [split.name for split in splits], overwrite, wait, note
    ) as building:
        return fill(building, opened, splits, workers, on_progress or (lambda *_: None), note)


def fill(
    building: Building,
    source: SampleSource,
    splits: list[PlannedSplit],
    workers: int,
    on_progress: Progress,
    on_note: Note,
) -> dict[str, ShardIndex]:
    """Write the planned splits of `source` and the files beside them.

    Shards that an earlier call finished are kept. Returns the index of every split.
    """
    indices = {}
    entries = _write(building, source.header, splits, workers, on_progress, on_note)
    for split in splits:
        shard_entries = tuple(
            entries[split.name, shard_name(split.name, shard)] for shard in range(split.shards)
        )
        indices[split.name] = replace(source.header_of(split.name), shards=shard_entries)
        building.write_index(split.name, indices[split.name])
    for name, content in source.files.items():
        building.write_beside(name, content)
    return indices


def check_target(source: str | Path | SampleSource | None, to: str | Path) -> Path:
    """Return the folder to make.

    Args:
        source: of the samples; None where it is no folder.
        to: a folder of this machine.

    Raises:
        UserError: `to` is an address, a dangling link, or inside the source, where the new files would be
            taken for the source's.
    """
    if parse(str(to)).protocol != "file" or (isinstance(to, str) and "://" in to):
        raise UserError(
            "to", f"{to} is no folder of this machine; make the shards here, and copy the folder there"
        )
    target = Path(to).absolute()
    if target.is_symlink() and not target.exists():
        raise UserError("to", f"{to} is a link to nothing; remove it, or make the folder that it points to")
    if (
        isinstance(source, (str, Path))
        and Path(source).is_dir()
        and Path(source).resolve() in target.resolve().parents
    ):
        raise UserError("to", f"{to} is inside the source {source}; choose a folder outside it")
    return target


def plan(source: SampleSource, options: PackOptions) -> list[PlannedSplit]:
    """Decide which sample goes where, from the source and the options alone. Raises UserError."""
    orders = {name: _shuffled(len(part), f"{options.seed}/{name}") for name, part in source.parts.items()}
    if "val" in orders and options.val is not None:
        found = len(source.parts["val"])
        raise UserError(
            "val", f"is {options.val}, but the source has its own val part with {found} samples; leave it out"
        )
    parts = dict(source.parts)
    if "val" not in orders:
        held_out = _held_out(len(orders["train"]), DEFAULT_VAL if options.val is None else options.val)
        parts["val"] = source.parts["train"]
        orders |= {"train": orders["train"][held_out:], "val": orders["train"][:held_out]}
    return [
        PlannedSplit(name, parts[name], orders[name], _shards(name, parts[name], orders[name], options))
        for name in SPLITS
        if name in orders
    ]


def _shards(name: str, part: SourcePart, order: list[int], options: PackOptions) -> int:
    if not order:
        raise DataError("source", f"the {name} part is empty")
    if name == "train" and options.shards is not None:
        return min(options.shards, len(order))
    probes = order[:_PROBED]
    mean_bytes = sum(sample.bytes for sample in part.take(probes)) / len(probes)
    return min(max(_FEWEST_SHARDS[name], math.ceil(mean_bytes * len(order) / SHARD_BYTES)), len(order))


def _held_out(samples: int, val: int | float) -> int:
    count = math.ceil(samples * val) if 0 < val < 1 else val
    if not (0 < count < samples and count == int(count)):
        raise UserError(
            "val",
            f"is {val}; it must be a number of samples from 1 to {samples - 1}, or a share above "
            "0 and below 1",
        )
    return int(count)


def _shuffled(samples: int, seed: str) -> list[int]:
    order = list(range(samples))
    random.Random(seed).shuffle(order)
    return order


def _fingerprint(spec: str | Path | SampleSource, source: SampleSource, options: PackOptions) -> str:
    named = "" if isinstance(spec, SampleSource) else str(spec)
    header = replace(source.header, shards=())
    chosen = options.val, options.shards, options.seed  # the header has the rest
    return fingerprint_of(named, source.fingerprint, repr(header), repr(chosen))


def fingerprint_of(*facts: object) -> str:
    """Return a sha256 of the facts that decide which bytes are written.

    The versions of the packages that write them count too.
    """
    versions = [__version__, *(importlib.metadata.version(package) for package in _WRITERS)]
    return hashlib.sha256(json.dumps([*facts, versions]).encode()).hexdigest()


def _write(
    building: Building,
    header: ShardIndex,
    splits: list[PlannedSplit],
    workers: int,
    on_progress: Progress,
    on_note: Note,
) -> dict[tuple[str, str], ShardEntry]:
    """Write the shards that are not finished yet, and return all entries by split and file name."""
    names = [(split.name, shard_name(split.name, shard)) for split in splits for shard in range(split.shards)]
    finished = {
        name: shard for name in names if (shard := finished_shard(building, *name, PackTally)) is not None
    }
    if finished:
        on_note(f"{len(finished)} of {len(names)} shards were finished before and are kept")
    totals = {split.name: len(split.order) for split in splits}
    done = {
        name: sum(shard.entry.samples for shard in finished.values() if shard.split == name)
        for name in totals
    }
    for name, total in totals.items():
        on_progress(name, done[name], total)
    with closing(
        run_jobs(_write_shard, _jobs(building, header.kind, splits, set(finished)), workers)
    ) as results:
        for shard in results:
            finished[shard.split, shard.entry.name] = shard
            done[shard.split] += shard.entry.samples
            on_progress(shard.split, done[shard.split], totals[shard.split])
    remarks: Counter[str] = Counter()
    for shard in finished.values():
        remarks.update(shard.tally.remarks)
    for remark, count in sorted(remarks.items()):
        on_note(f"{count} {'image' if count == 1 else 'images'} {remark}")
    return {name: shard.entry for name, shard in finished.items()}


def _jobs(
    building: Building, kind: str, splits: list[PlannedSplit], kept: set[tuple[str, str]]
) -> Iterator[PackJob]:
    for split in splits:
        for shard in range(split.shards):
            if (split.name, shard_name(split.name, shard)) not in kept:
                start, stop = split.start(shard), split.start(shard + 1)
                samples = split.part.take(split.order[start:stop])
                yield PackJob(building, split.name, shard_name(split.name, shard), kind, samples, start)


def _write_shard(job: PackJob) -> Done[PackTally]:
    tally = PackTally()
    samples = tally.counted(job.samples)
    return write_tallied(job.building, job.split, job.name, job.kind, samples, tally, job.first)
