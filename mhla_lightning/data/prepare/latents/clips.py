"""The clips to encode, from shards of `mhla data clips`, and their captions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mhla_lightning.data.check import check_split
from mhla_lightning.data.index import INDEX_NAME, Clip, read_index
from mhla_lightning.data.kinds.captions import CAPTION
from mhla_lightning.data.prepare.latents.images import ShardPart, shards_for
from mhla_lightning.data.prepare.latents.shard_captions import shard_texts
from mhla_lightning.data.prepare.pack import PackOptions, PlannedSplit
from mhla_lightning.data.prepare.places import find_splits
from mhla_lightning.data.prepare.replacing import is_bucket
from mhla_lightning.data.split import Split
from mhla_lightning.errors import DataError, UserError
from mhla_lightning.textfiles import NotText, decode

_AT_ONCE = 2**26  # bytes of clips that are read at once


@dataclass(frozen=True)
class ClipSplit:
    """A split of clips of one size.

    Args:
        name: SPLIT, or BUCKET/SPLIT.
        split: of the source.
        clip: size and rate.
    """

    name: str
    split: Split
    clip: Clip

    @property
    def address(self) -> str:
        """The address of its index."""
        return self.split.store.address(INDEX_NAME)

    def plan(self, shards: int | None, sample_bytes: int) -> PlannedSplit:
        """Plan its latents: clips in their order.

        Args:
            shards: number of training shards; None decides by size.
            sample_bytes: expected bytes of a sample in the new shards.
        """
        at_once = max(1, _AT_ONCE // (3 * math.prod((self.clip.frames, self.clip.height, self.clip.width))))
        part = ShardPart(self.split, range(self.split.samples), at_once)
        planned = PlannedSplit(self.name.rpartition("/")[2], part, list(range(len(part))), 1)
        return PlannedSplit(
            planned.name, part, planned.order, shards_for(planned, PackOptions(shards=shards), sample_bytes)
        )

    def captions(self) -> Iterator[tuple[str, str]]:
        """Yield (name of the sample, caption) of every clip, without reading the clips themselves.

        Raises DataError for a clip without a caption.
        """
        for name, members in shard_texts(self.split, self.name):
            if CAPTION not in members:
                raise DataError(
                    f"{self.name} sample {name}", f"it has no caption; each clip needs a member {CAPTION}"
                )
            try:
                yield name, decode(members[CAPTION])
            except NotText as error:
                raise DataError(f"{self.name} sample {name}", f"its caption: {error}") from error


def open_clips(source: str | Path) -> list[ClipSplit]:
    """Open the splits of packed clips, or of a folder's buckets FRAMESxHEIGHTxWIDTH/.

    Args:
        source: folder or address.

    Raises:
        DataError: anything but clips, or shards that differ from their index.
    """
    found = []
    for prefix, place in _places(str(source)).items():
        for name, store in find_splits(place).items():
            index = read_index(store)
            address = store.address(INDEX_NAME)
            if index.kind != "clips" or index.clip is None:
                raise DataError(address, f"holds {index.kind}; clips are needed (mhla data clips)")
            split = Split(index, store)
            check_split(split, "size" if "://" not in str(source) else "none")
            found.append(ClipSplit(prefix + name, split, index.clip))
    return found


def _places(source: str) -> dict[str, str]:
    """Return the data sets of a source by the prefix of their splits' names."""
    if "://" in source:
        return {"": source}
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise UserError("source", f"there is no folder {source}")
    buckets = sorted(path for path in folder.iterdir() if path.is_dir() and is_bucket(path.name))
    return {f"{path.name}/": str(path) for path in buckets} or {"": str(folder)}
