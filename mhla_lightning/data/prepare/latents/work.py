"""The making of the latents of all splits.

Shards that are not finished are encoded, wherever a device is free. The indices are written in the end.
"""

from __future__ import annotations

import importlib.metadata
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mhla_lightning.data.index import EMPTY_TEXT, ShardIndex, read_index
from mhla_lightning.data.prepare.latents.captions import EncodedTexts, encode_captions
from mhla_lightning.data.prepare.latents.shard import (
    LatentJob,
    LatentTally,
    LatentTarget,
    encode_shard,
    make_jobs,
)
from mhla_lightning.data.prepare.pack import Progress, fingerprint_of
from mhla_lightning.data.prepare.parallel import Interrupted, run_jobs
from mhla_lightning.data.prepare.replacing import Building, Note, build, demand_free
from mhla_lightning.data.prepare.tallies import Done, finished_shard
from mhla_lightning.data.skips import JUDGED_AFTER
from mhla_lightning.errors import DataError, UserError

SETTINGS = "latents.json"  # in the hidden folder: see settings_of


@dataclass
class LatentReport:
    """What was written.

    Args:
        indices: by split; their `vae` holds the statistics.
        skipped: (split, name, reason).
        uncaptioned: (split, name, reason) of images that were left out because they have no caption.
        samples: encoded by this call.
        seconds: that the encoding took.
    """

    indices: dict[str, ShardIndex] = field(default_factory=dict)
    skipped: list[tuple[str, str, str]] = field(default_factory=list)
    uncaptioned: list[tuple[str, str, str]] = field(default_factory=list)
    samples: int = 0
    seconds: float = 0.0


class LatentWork:
    """All shards of a target in the making.

    Args:
        building: of the target.
        targets: the splits to make.
        what: the name of the samples in messages, such as "images".
        limit: share of samples that may be left out.
        on_progress: called with a split, its samples done and its samples in all.
    """

    def __init__(
        self,
        building: Building,
        targets: Sequence[LatentTarget],
        what: str,
        limit: float,
        on_progress: Progress,
    ) -> None:
        self.building, self.what, self.limit = building, what, limit
        self.targets = {target.name: target for target in targets}
        self.planned = {
            (name, shard): target.samples(n)
            for name, target in self.targets.items()
            for n, shard in enumerate(target.shards)
        }
        self.devices = targets[0].encoder.devices
        self.done: dict[tuple[str, str], Done[LatentTally]] = {}
        self._seen = dict.fromkeys(self.targets, 0)
        self._on_progress = on_progress

    def run(self, note: Note) -> LatentReport:
        """Encode the shards that are not finished, and write the indices."""
        for name, target in self.targets.items():
            found = {
                shard: finished_shard(self.building, name, shard, LatentTally) for shard in target.shards
            }
            self.done |= {(name, shard): done for shard, done in found.items() if done is not None}
            self._advance(
                name, sum(self.planned[name, shard] for shard, done in found.items() if done is not None)
            )
        kept = len(self.done)
        if kept:
            note(f"{kept} of {len(self.planned)} shards were finished before and are kept")
        report, start = LatentReport(), time.perf_counter()
        report.samples = self._encode()
        report.seconds = time.perf_counter() - start
        for name, target in self.targets.items():
            shards = [self.done[name, shard] for shard in target.shards]
            report.indices[name] = _index(target.header, shards)
            self.building.write_index(name, report.indices[name])
            report.skipped += [(name, *skipped) for shard in shards for skipped in shard.tally.skipped]
        return report

    def _encode(self) -> int:
        """Encode, and return the number of samples that were read."""
        alone = len(self.devices) == 1
        work: Callable[[LatentJob], Done[LatentTally]] = (
            partial(encode_shard, on_samples=self._advance) if alone else encode_shard
        )
        before = sum(self._seen.values())
        try:
            with closing(run_jobs(work, self._jobs(), len(self.devices))) as results:
                for shard in results:
                    self.done[shard.split, shard.entry.name] = shard
                    self._judge()
                    if not alone:
                        self._advance(shard.split, self.planned[shard.split, shard.entry.name])
        except Interrupted:
            raise
        except UserError as error:
            if self.done:  # hours of work may be finished; keep them until the mistake is corrected
                raise Interrupted(error.key, error.reason) from error
            raise
        return sum(self._seen.values()) - before

    def _jobs(self) -> Iterator[LatentJob]:
        return chain.from_iterable(
            make_jobs(
                self.building,
                target,
                [number for number, shard in enumerate(target.shards) if (name, shard) not in self.done],
            )
            for name, target in self.targets.items()
        )

    def _advance(self, split: str, samples: int) -> None:
        self._seen[split] += samples
        self._on_progress(split, self._seen[split], len(self.targets[split].source.order))

    def _judge(self) -> None:
        """Raise DataError when more samples were skipped than the limit allows."""
        read = sum(self.planned[key] for key in self.done)
        skipped = [(split, *one) for (split, _), shard in self.done.items() for one in shard.tally.skipped]
        if (
            skipped
            and (read >= JUDGED_AFTER or len(self.done) == len(self.planned))
            and len(skipped) > self.limit * read
        ):
            split, name, reason = skipped[-1]
            found = f"{len(skipped)} of {read} {self.what} ({len(skipped) / read:.1%}) give no latent"
            raise DataError(
                "max_skipped_share",
                f"{found}, more than the share {self.limit:g} that is allowed; the last is {name} of "
                f"{split} ({reason})",
            )


@dataclass(frozen=True)
class LatentPlan:
    """What a call makes.

    Args:
        what: the name of the samples in messages, such as "images".
        headers: an index without shards of every split that the target may get, by name.
        splits: names of those that it gets.
        settings: the facts that decide which bytes are written; see settings_of.
        dtype: of devices.DTYPES.
        devices: see devices.find_devices.
        limit: share of samples that may be left out.
        captions: returns all captions, each with the sample that it was first found at; None without text.
        targets: returns the splits to make, given the encoded captions.
        cut: leave out the tokens of a caption that are too many.
    """

    what: str
    headers: Mapping[str, ShardIndex]
    splits: Sequence[str]
    settings: dict[str, Any]
    dtype: str
    devices: tuple[str, ...]
    limit: float
    captions: Callable[[], Mapping[str, str]] | None
    targets: Callable[[EncodedTexts | None], Sequence[LatentTarget]]
    cut: bool = False


def make_planned(
    target: Path,
    plan: LatentPlan,
    overwrite: bool,
    wait: bool,
    on_progress: Progress | None,
    on_note: Note | None,
) -> LatentReport:
    """Encode captions, where there are some, then the latents, and write all of it as `target`.

    Args:
        target: the folder to make.
        plan: what to make.
        overwrite: replace the target if it holds splits, and work that another command has begun there.
        wait: wait for another process that makes the target.
        on_progress: called with a split, its samples done and its samples in all.
        on_note: called with remarks for the user.

    Raises:
        UserError: a target in use.
        DataError: a caption that is missing or too long, or samples that cannot be encoded.
        Interrupted: work that the same call can continue.
    """
    note, progress = on_note or (lambda _: None), on_progress or (lambda *_: None)
    demand_target(target, plan.headers, plan.settings, overwrite)
    with build(target, fingerprint_of(plan.settings), plan.splits, overwrite, wait, note) as building:
        (building.folder / SETTINGS).write_text(json.dumps(plan.settings))
        texts = None
        if plan.captions is not None:
            text = next(iter(plan.headers.values())).text
            assert text is not None
            texts = encode_captions(
                building,
                plan.captions(),
                text,
                plan.cut,
                plan.dtype,
                plan.devices,
                lambda done, total: progress("captions", done, total),
                note,
            )
        report = LatentWork(building, plan.targets(texts), plan.what, plan.limit, progress).run(note)
        if texts is not None:
            for folder in dict.fromkeys(split.rpartition("/")[0] for split in plan.splits):
                building.write_beside(f"{folder}/{EMPTY_TEXT}" if folder else EMPTY_TEXT, texts.empty)
        return report


def settings_of(facts: dict[str, Any], dtype: str, device: str, packages: Sequence[str]) -> dict[str, Any]:
    """Return the facts that decide which bytes are written, for the user to read.

    Args:
        facts: of the source and the options.
        dtype: of devices.DTYPES.
        device: its type counts.
        packages: their versions count.
    """
    where = {"dtype": dtype, "device": torch.device(device).type}
    return json.loads(
        json.dumps(facts | where | {package: importlib.metadata.version(package) for package in packages})
    )


def demand_target(
    target: Path, headers: Mapping[str, ShardIndex], settings: dict[str, Any], overwrite: bool
) -> None:
    """Raise UserError when the target holds anything, or other latents are being made there.

    Args:
        target: the folder to make.
        headers: of the splits to make, by name.
        settings: of this call; see settings_of.
        overwrite: accept all of these.
    """
    if overwrite:
        return
    with suppress(DataError, StopIteration):
        name, header = next((name, header) for name, header in headers.items() if (target / name).is_dir())
        found = read_index(target / name)
        assert header.vae is not None
        if found.vae is None or not header.vae.fits(found.vae):
            what = f"latents of {found.vae}" if found.vae else found.kind
            raise UserError(
                str(target),
                f"holds {what}, and these would be of {header.vae}; choose another folder, or pass "
                "`overwrite`",
            )
    demand_free(target, overwrite)
    with suppress(OSError, ValueError, AssertionError):
        begun = json.loads((target.parent / f".{target.name}.packing" / SETTINGS).read_text())
        assert isinstance(begun, dict)
        other = [
            f"{name} {begun.get(name)} instead of {value}"
            for name, value in settings.items()
            if begun.get(name) != value
        ]
        if other:
            raise UserError(
                str(target),
                f"was begun with {', '.join(other)[:500]}; run that command again to finish it, "
                "choose another folder, or pass `overwrite`",
            )


def _index(header: ShardIndex, shards: Sequence[Done[LatentTally]]) -> ShardIndex:
    """Return the index of a split, with the statistics of its latents."""
    assert header.vae is not None
    tallies: list[LatentTally] = [shard.tally for shard in shards if shard.tally.values]
    values = sum(tally.values for tally in tallies)
    if not values:
        raise DataError(shards[0].split, f"no sample gives a latent; {': '.join(shards[0].tally.skipped[0])}")
    mean, square = (
        np.sum([getattr(tally, name) for tally in tallies], axis=0) / values for name in ("sums", "squares")
    )
    std = np.sqrt(np.maximum(square - mean**2, 0))
    vae = replace(header.vae, mean=tuple(mean.tolist()), std=tuple(std.tolist()))
    return replace(header, shards=tuple(shard.entry for shard in shards), vae=vae)
