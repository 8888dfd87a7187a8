"""Folders that appear whole or not at all; an interrupted making can be continued.

The folder `.TARGET.packing` beside TARGET holds the work.

    lock, holder.json  the lock, and the process that holds it
    plan.json          the fingerprint of what is being built
    parts/             shards being written
    data/SPLIT/        finished shards and their offsets; takes the target's name in the end
    entries/SPLIT/     NAME.json for each finished shard, written last
    tokens/            the tokens made so far (text/chunks.py)
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
from mhla_lightning.data.prepare.locking import LOCK_FILES, hold_folder
from mhla_lightning.data.prepare.parallel import Interrupted
from mhla_lightning.data.prepare.samples import Sample, npy_bytes
from mhla_lightning.data.prepare.shards import describe_shard, write_shard
from mhla_lightning.errors import UserError

FORMAT = 1
Note = Callable[[str], None]  # called with remarks for the user while something is built
# Files that a target may hold beside its splits.
BESIDE = ("tokenizer.json", "tokenizer_config.json", EMPTY_TEXT)
_BUCKET = re.compile(r"\d+x\d+x\d+")  # a folder of splits, of videos of one size
_KEPT = ("entries", "data")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Building:
    """A target in the making.

    It can be pickled, and several processes may finish shards of it at once.

    Args:
        folder: the hidden folder of the work.
    """

    folder: Path

    def finished(self, split: str, name: str) -> ShardEntry | None:
        """Return the entry of a shard that an earlier call finished, else None."""
        try:
            entry = ShardEntry(**json.loads(self._entry(split, name).read_text()))
            path = self.folder / "data" / split / name
            beside = offsets_path(path.parent, name)
            offsets = np.load(beside, allow_pickle=False)
            whole = (
                path.stat().st_size == entry.bytes
                and beside.stat().st_size == len(npy_bytes(offsets))
                and offsets.shape == (entry.samples + 1,)
                and bool((np.diff(offsets) >= 0).all())
            )
            return entry if whole else None
        except (OSError, ValueError, TypeError, EOFError):
            return None

    def write(
        self, split: str, name: str, kind: str, samples: Iterable[Sample], first: int = 0
    ) -> ShardEntry:
        """Write and finish a shard.

        Args:
            split: the folder of the shard below the target.
            name: file name of the shard.
            kind: kind of the samples.
            samples: in the order of writing.
            first: index in the split of the first sample.

        Raises:
            Interrupted: the disk is full or fails.
        """
        # The random part keeps apart two processes that write the same shard.
        part = self.folder / "parts" / f"{name}.{uuid.uuid4().hex[:8]}"
        try:
            write_shard(part, samples, first)
            entry, offsets = describe_shard(part, kind)
            entry = replace(entry, name=name)
            self._finish(part, split, entry, offsets)
        except OSError as error:
            raise Interrupted(
                str(self.folder),
                f"cannot be written ({error.strerror or error}); run the same command again when that "
                "is solved",
            ) from error
        return entry

    def write_index(self, split: str, index: ShardIndex) -> None:
        """Write the index of a split whose shards are finished."""
        write_index(self.folder / "data" / split, index)
        sync(self.folder / "data" / split / INDEX_NAME)

    def write_beside(self, name: str, content: bytes) -> None:
        """Write one of the files that BESIDE lists."""
        path = self.folder / "data" / name
        path.write_bytes(content)
        sync(path)

    def begin(self, splits: Iterable[str]) -> None:
        """Make the folders of the splits and remove the shards that were not finished."""
        shutil.rmtree(self.folder / "parts", ignore_errors=True)
        (self.folder / "parts").mkdir()
        for split in splits:
            for kept in _KEPT:
                (self.folder / kept / split).mkdir(parents=True, exist_ok=True)

    def _finish(self, part: Path, split: str, entry: ShardEntry, offsets: np.ndarray) -> None:
        beside, entry_file = part.with_name(f"{part.name}.npy"), part.with_name(f"{part.name}.json")
        np.save(beside, offsets, allow_pickle=False)
        entry_file.write_text(json.dumps(asdict(entry)))
        sync(beside)
        sync(entry_file)
        folder = self.folder / "data" / split
        part.rename(folder / entry.name)
        beside.rename(offsets_path(folder, entry.name))
        entry_file.rename(self._entry(split, entry.name))

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
    """Give the block a building, whose data takes the name `target` when the block ends well.

    A mistake in the data (UserError) removes the building. Any other end of the block (Interrupted, Ctrl-C, a
    kill) leaves it, and the next call with the same fingerprint continues it.

    Args:
        target: the folder to make.
        fingerprint: changes when other bytes would be written.
        splits: names of the splits.
        overwrite: replace a target that holds splits and nothing else.
        wait: wait for another process that builds the same target; False refuses.
        on_note: called with remarks for the user.

    Raises:
        UserError: the target is in use.
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
        except BaseException:  # Ctrl-C above all
            on_note(f"finished shards stay in {hidden}; the same command continues with them")
            raise
        shutil.rmtree(hidden, ignore_errors=True)


@contextmanager
def new_folder(target: Path, overwrite: bool) -> Iterator[Path]:
    """Give the block a hidden folder that takes the name `target` when the block ends well.

    The folder disappears when the block fails: this is for work that cannot be continued.

    Args:
        target: the folder to make.
        overwrite: replace a target that holds splits and nothing else.

    Raises:
        UserError: the target is in use, or came into use meanwhile.
    """
    with build(target, uuid.uuid4().hex, (), overwrite, on_note=lambda _: None) as building:
        (building.folder / "data").mkdir()
        try:
            yield building.folder / "data"
        except BaseException:
            shutil.rmtree(building.folder, ignore_errors=True)
            raise


def demand_free(target: Path, overwrite: bool) -> None:
    """Raise UserError when `target` exists and is not empty, unless it may be overwritten.

    Args:
        target: the folder to make.
        overwrite: accept a target that holds splits and files of BESIDE only.
    """
    if not target.exists() or (target.is_dir() and not _names(target)):
        return
    if not overwrite:
        raise UserError(str(target), "exists and is not empty; choose another folder, or pass `overwrite`")
    foreign = (
        target.name
        if target.is_file()
        else next((name for name in _names(target) if not _is_ours(target / name)), None)
    )
    if foreign is not None:
        raise UserError(
            str(target),
            f"holds {foreign}, which `mhla data` did not write, so it is not overwritten; choose "
            "another folder",
        )


def _continue_or_clear(hidden: Path, fingerprint: str, on_note: Note) -> None:
    plan = hidden / "plan.json"
    content = json.dumps({"format": FORMAT, "fingerprint": fingerprint})
    if plan.is_file():
        if plan.read_bytes() == content.encode():
            return
        on_note(f"{hidden} was left by a command with another source or other options; starting anew")
    for path in hidden.iterdir():
        if path.name not in LOCK_FILES:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    new = hidden / "plan.json.new"
    new.write_text(content)
    sync(new)  # without its plan the work of hours would begin anew
    new.rename(plan)


def is_bucket(name: str) -> bool:
    """Return whether a folder of this name, FRAMESxHEIGHTxWIDTH, holds videos of one size."""
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
        # Fails on a folder that is not empty: another process finished first.
        (hidden / "data").rename(target)
    except OSError as error:
        raise UserError(
            str(target), f"another process made it meanwhile, or it cannot be written ({error.strerror})"
        ) from error


def _restore(hidden: Path, target: Path) -> None:
    """Put a replaced target back: a process was killed between the two renames of _move."""
    if (hidden / "old").exists() and not target.exists():
        (hidden / "old").rename(target)


def sync(path: Path) -> None:
    """Wait until a file is on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
