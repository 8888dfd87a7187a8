"""What becomes known of a shard while it is written. It stands beside the shard until the whole is done,
so that a killed build goes on with it.
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
    """Write a shard and the tally that is complete when `samples` are through. first: index in the split
    of its first sample.
    """
    path = _path(building, split, name)

    def then_tally() -> Iterator[Sample]:  # before Building.write calls the shard finished
        yield from samples
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(tally)))
        sync(path)

    return Done(split, building.write(split, name, kind, then_tally(), first), tally)


def finished_shard(building: Building, split: str, name: str, tally: type[T]) -> Done[T] | None:
    """A shard that an earlier call finished, else None."""
    entry = building.finished(split, name)
    if entry is None:
        return None
    try:
        found: dict[str, Any] = json.loads(_path(building, split, name).read_text())
        return Done(split, entry, tally(**found))
    except (OSError, ValueError, TypeError):
        return None


def _path(building: Building, split: str, name: str) -> Path:
    return building.folder / "tallies" / split / f"{name}.json"
