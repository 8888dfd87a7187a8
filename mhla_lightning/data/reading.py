"""Raw samples out of tar shards, through webdataset's tar reader.

The reader is fed files that we open ourselves: webdataset's own opener runs commands (`pipe:`) and rewrites addresses from the environment.
Nothing is decoded here, and no default decoder runs: those unpickle members.
"""

from __future__ import annotations

import tarfile
from bisect import bisect_right
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from webdataset.tariterators import group_by_keys, tar_file_expander

from mhla_lightning.data.index import ShardIndex, read_offsets
from mhla_lightning.errors import DataError

RawSample = dict[str, Any]  # "__key__": str, "__url__": the shard's path, "__index__": global index, and the members' bytes by extension


def read_shard(path: str | Path, expected: int, *, first_index: int = 0, offset: int = 0) -> Iterator[RawSample]:
    """The `expected` samples of a shard from byte `offset` on (a sample's first header); the first gets the global index `first_index`.

    Raises DataError naming the shard when it cannot be read or ends early (webdataset alone takes a cut between two members for the end).
    """
    found = 0
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            members = tar_file_expander([{"url": str(path), "stream": file}])
            for found, sample in enumerate(islice(group_by_keys(members), expected), start=1):
                sample["__index__"] = first_index + found - 1
                yield sample
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise DataError(f"{path} cannot be read after {found} of {expected} samples ({_reason(error)}): copy it again") from error
    if found != expected:
        raise DataError(f"{path} ends after {found} of {expected} samples: it was cut; copy it again")


def read_range(split_dir: str | Path, index: ShardIndex, start: int, stop: int) -> Iterator[RawSample]:
    """The samples with global indices [start, stop), in order, found through the shards' offsets."""
    firsts = index.first_indices()
    while start < stop:
        shard = bisect_right(firsts, start) - 1
        entry, position = index.shards[shard], start - firsts[shard]
        count = min(stop, firsts[shard + 1]) - start
        offset = int(read_offsets(split_dir, entry)[position])
        yield from read_shard(Path(split_dir, entry.name), count, first_index=start, offset=offset)
        start += count


def _reason(error: Exception) -> str:
    """The first line of the reader's own message; webdataset appends its internals to the arguments."""
    return str(error.args[0] if error.args else error).split(" @ ")[0]
