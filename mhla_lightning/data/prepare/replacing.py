"""A data folder that appears whole or not at all, and whose making can be interrupted and continued.

TARGET is built in `.TARGET.packing` beside it:
    lock              held (flock) by the process that builds
    plan.json         the fingerprint of what is being built
    parts/            shards being written
    data/SPLIT/       finished shards and their offsets; in the end the folder that takes the target's name
    entries/SPLIT/    NAME.json for each finished shard, written last
    tokens/           what tools/text has tokenized so far
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from mhla_lightning.data.index import (
    EMPTY_TEXT,
    INDEX_NAME,
    SPLITS,
    ShardEntry,
    ShardIndex,
    offsets_path,
    write_index,
)
from mhla_lightning.data.prepare.locking import hold_folder
from mhla_lightning.data.prepare.parallel import Interrupted
from mhla_lightning.data.prepare.samples import Sample
from mhla_lightning.data.prepare.shards import describe_shard, write_shard
from mhla_lightning.errors import UserError

FORMAT = 1
Note = Callable[[str], None]  # is told what a user should know while something is built
BESIDE = (
    "tokenizer.json",
    "tokenizer_config.json",
    EMPTY_TEXT,
)  # files that a target may hold beside its splits
_BUCKET = re.compile(r"\d+x\d+x\d+")  # a folder of splits, of videos of one size
_KEPT = ("entries", "data")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Building:
    """A target in the making. Picklable; several processes may finish shards of it at once. folder: the
    hidden one.
    """

    folder: Path

    def finished(self, split: str, name: str) -> ShardEntry | None:
        """The entry of a shard that an earlier call finished, else None."""
        try:
            entry = ShardEntry(**json.loads(self._entry(split, name).read_text()))
            path = self.folder / "data" / split / name
            return (
                entry
                if path.stat().st_size == entry.bytes and offsets_path(path.parent, name).is_file()
                else None
            )
        except (OSError, ValueError, TypeError):
            return None

    def write(
        self, split: str, name: str, kind: str, samples: Iterable[Sample], first: int = 0
    ) -> ShardEntry:
        """Write and finish a shard. first: index in the split of its first sample. Raises Interrupted when
        the disk is full or fails.
        """
        part = (
            self.folder / "parts" / f"{name}.{uuid.uuid4().hex[:8]}"
        )  # two who write the same shard do not meet
        try:
            write_shard(part, samples, first)
            entry, offsets = describe_shard(part, kind)
            entry = replace(entry, name=name)
            self._finish(part, split, entry, offsets)
        except OSError as error:
            raise Interrupted(
                f"{self.folder} cannot be written ({error.strerror or error}): run the same command "
                "again when that is solved"
            ) from error
        return entry

    def write_index(self, split: str, index: ShardIndex) -> None:
        """Write the index of a split whose shards are finished."""
        write_index(self.folder / "data" / split, index)
        sync(self.folder / "data" / split / INDEX_NAME)

    def write_beside(self, name: str, content: bytes) -> None:
        """Write one of BESIDE."""
        path = self.folder / "data" / name
        path.write_bytes(content)
        sync(path)

    def begin(self, splits: Iterable[str]) -> None:
        """Make the folders of the splits and throw away the shards that were not finished."""
        shutil.rmtree(self.folder / "parts", ignore_errors=True)
        (self.folder / "parts").mkdir()
        for split in splits:
            for kept in _KEPT:
                (self.folder / kept / split).mkdir(parents=True, exist_ok=True)

    def _finish(self, part: Path, split: str, entry: ShardEntry, offsets: np.ndarray) -> None:
        beside, told = part.with_name(f"{part.name}.npy"), part.with_name(f"{part.name}.json")
        np.save(beside, offsets, allow_pickle=False)
        told.write_text(json.dumps(asdict(entry)))
        sync(beside)
        sync(told)
        folder = self.folder / "data" / split
        part.rename(folder / entry.name)
        beside.rename(offsets_path(folder, entry.name))
        told.rename(self._entry(split, entry.name))

    def _entry(self, split: str, name: str) -> Path:
        return self.folder / "entries" / split / f"{name}.json"


@contextmanager
def build(
    target: Path,
    fingerprint: str,
    splits: Iterable[str],
    overwrite: bool,
    wait: bool = False,
    on_note: Note = _log.info,
) -> Iterator[Building]:
    """A building whose data takes the name `target` when the block ends well.

    A mistake in the data (UserError) removes it; whatever else ends the block (Interrupted, Ctrl-C, a kill)
    leaves it, and the next call with the
    same fingerprint continues it. splits: names. overwrite: replace a target that holds splits and nothing
        else. wait: for another process that
    builds the same target, instead of refusing. Raises UserError when the target is in use.
    """
    demand_free(target, overwrite)
    hidden = target.parent / f".{target.name}.packing"
    with hold_folder(hidden, target, wait):
        _restore(hidden, target)
        try:
            demand_free(target, overwrite)  # another process may have finished it while this one waited
            _continue_or_clear(hidden, fingerprint, on_note)
            building = Building(hidden)
            building.begin(splits)
            yield building
            _move(hidden, target, overwrite)
        except Interrupted:
            raise
        except UserError:
            shutil.rmtree(hidden, ignore_errors=True)
            raise
        except BaseException:  # Ctrl-C above all: told, and raised again
            on_note(f"finished shards stay in {hidden}: the same command continues with them")
            raise
        shutil.rmtree(hidden, ignore_errors=True)


@contextmanager
def new_folder(target: Path, overwrite: bool) -> Iterator[Path]:
    """A hidden folder beside `target` that takes its name when the block ends well and disappears when it
    does not: for what cannot be continued.

    overwrite: replace a target that holds splits and nothing else. Raises UserError when the target is in
        use, or came into use meanwhile.
    """
    with build(target, uuid.uuid4().hex, (), overwrite, on_note=lambda _: None) as building:
        (building.folder / "data").mkdir()
        try:
            yield building.folder / "data"
        except BaseException:
            shutil.rmtree(building.folder, ignore_errors=True)
            raise


def demand_free(target: Path, overwrite: bool) -> None:
    """Raise UserError when `target` exists and is not empty, unless it holds splits and BESIDE only and
    may be overwritten.
    """
    if not target.exists() or (target.is_dir() and not _names(target)):
        return
    if not overwrite:
        raise UserError(f"{target} exists and is not empty: choose another folder, or pass --overwrite")
    foreign = (
        target.name
        if target.is_file()
        else next((name for name in _names(target) if not _is_ours(target / name)), None)
    )
    if foreign is not None:
        raise UserError(
            f"{target} holds {foreign}, which mhla data pack did not write, so it is not "
            "overwritten: choose another folder"
        )


def _continue_or_clear(hidden: Path, fingerprint: str, on_note: Note) -> None:
    plan = hidden / "plan.json"
    content = json.dumps({"format": FORMAT, "fingerprint": fingerprint})
    if plan.is_file():
        if plan.read_text() == content:
            return
        on_note(f"{hidden} was left by a packing of another source or with other options: starting anew")
    for path in hidden.iterdir():
        if path.name != "lock":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    new = hidden / "plan.json.new"
    new.write_text(content)
    new.rename(plan)


def is_bucket(name: str) -> bool:
    """Whether a folder of this name holds the splits of videos of one size: FRAMESxHEIGHTxWIDTH."""
    return _BUCKET.fullmatch(name) is not None


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _is_ours(path: Path) -> bool:
    if is_bucket(path.name) and path.is_dir():
        return all(_is_ours(path / name) for name in _names(path))
    return (path.name in SPLITS and (path / INDEX_NAME).is_file()) or (path.name in BESIDE and path.is_file())


def _move(hidden: Path, target: Path, overwrite: bool) -> None:
    try:
        if overwrite and target.exists():
            target.rename(hidden / "old")
        (hidden / "data").rename(
            target
        )  # fails on a folder that is not empty: one that another process finished first
    except OSError as error:
        raise UserError(
            f"{target} was made by another process meanwhile, or cannot be written ({error.strerror})"
        ) from error


def _restore(hidden: Path, target: Path) -> None:
    """A process that was killed between the two renames of _move left the replaced target here."""
    if (hidden / "old").exists() and not target.exists():
        (hidden / "old").rename(target)


def sync(path: Path) -> None:
    """Wait until a file is on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
