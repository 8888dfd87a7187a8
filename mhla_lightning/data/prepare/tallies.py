"""Facts that become known while a shard is written.

They are kept beside the shard until the whole target is done, so that a killed build continues with them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from mhla_lightning.data.index import ShardEntry
from mhla_lightning.data.prepare.replacing import Building, sync
from mhla_lightning.data.prepare.samples import Sample

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")


class Done(NamedTuple, Generic[T]):
    """A shard that is written."""

    split: str
    entry: ShardEntry
    tally: T


def write_tallied(
    building: Building, split: str, name: str, kind: str, samples: Iterator[Sample], tally: T, first: int
) -> Done[T]:
    """Write a shard, and its tally, which is complete when all samples are written.

    Args:
        building: of the target.
        split: the folder of the shard below the target.
        name: file name of the shard.
        kind: kind of the samples.
        samples: in the order of writing; taking them completes the tally.
        tally: the facts to keep.
        first: index in the split of the first sample.
    """
    path = _path(building, split, name)

    def then_tally() -> Iterator[Sample]:  # before Building.write calls the shard finished
        yield from samples
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(tally)))
        sync(path)

    return Done(split, building.write(split, name, kind, then_tally(), first), tally)


def finished_shard(building: Building, split: str, name: str, tally: type[T]) -> Done[T] | None:
    """Return a shard that an earlier call finished, else None."""
    entry = building.finished(split, name)
    if entry is None:
        return None
    try:
        found: dict[str, Any] = json.loads(_path(building, split, name).read_bytes())
        return Done(split, entry, tally(**found))
    except (OSError, ValueError, TypeError):
        return None


def _path(building: Building, split: str, name: str) -> Path:
    return building.folder / "tallies" / split / f"{name}.json"
