"""Splits written in one pass from samples that come one after another.

`pack` writes in parallel and can be continued; this writer cannot.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
from webdataset.writer import TarWriter

from mhla_lightning.data.index import ShardEntry, ShardIndex, offsets_path, write_index
from mhla_lightning.data.prepare.samples import Sample
from mhla_lightning.data.prepare.shards import SHARD_BYTES, describe_shard, open_tar, shard_name, write_sample
from mhla_lightning.errors import DataError


class ShardWriter:
    """A writer of one split, shard after shard.

        with ShardWriter(folder / "train", header) as writer:
            writer.write(sample)

    The same samples give the same bytes. The index is written when the block ends well, and is then in
    `.index`; a folder without an index is not taken for a split. Make the folder inside
    replacing.new_folder, so that the whole target appears at once.

    Args:
        folder: of the split, named train, val or test; it must not exist yet.
        header: an index with the kind, classes, tokenizer, vae and length of the samples; its shards are
            ignored.
        shard_bytes: size from which on a shard is followed by the next.
    """

    def __init__(self, folder: Path, header: ShardIndex, shard_bytes: int = SHARD_BYTES) -> None:
        folder.mkdir()
        self.folder, self.shard_bytes = folder, shard_bytes
        self.index = replace(header, shards=())
        self._entries: list[ShardEntry] = []
        self._first = self._rows = self._bytes = 0
        self._file: BinaryIO | None = None
        self._tar: TarWriter | None = None

    def write(self, sample: Sample) -> None:
        """Write a sample (of samples.image_sample, latent_sample or token_samples)."""
        if self._tar is None:
            self._file = open(self._path(), "wb")  # noqa: SIM115  closed by _end_shard or __exit__
            self._tar = open_tar(self._file)
        self._bytes += write_sample(self._tar, sample, self._first + self._rows)
        self._rows += sample.rows
        if self._bytes >= self.shard_bytes:
            self._end_shard()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the split. Raises DataError when no sample was written."""
        if error is not None:
            if self._tar is not None and self._file is not None:
                with suppress(OSError):  # the disk may be full, which is the error on its way
                    self._tar.close()
                self._file.close()
            return
        self._end_shard()
        if not self._entries:
            raise DataError(str(self.folder), "no samples were written")
        self.index = replace(self.index, shards=tuple(self._entries))
        write_index(self.folder, self.index)

    def _path(self) -> Path:
        return self.folder / shard_name(self.folder.name, len(self._entries))

    def _end_shard(self) -> None:
        if self._tar is None or self._file is None:
            return
        self._tar.close()
        self._file.close()
        entry, offsets = describe_shard(self._path(), self.index.kind)
        np.save(offsets_path(self.folder, entry.name), offsets, allow_pickle=False)
        self._entries.append(entry)
        self._first, self._rows, self._bytes = self._first + self._rows, 0, 0
        self._tar = self._file = None


def write_split(
    folder: Path, header: ShardIndex, samples: Iterable[Sample], shard_bytes: int = SHARD_BYTES
) -> ShardIndex:
    """Write all samples as a split (see ShardWriter) and return its index."""
    with ShardWriter(folder, header, shard_bytes) as writer:
        for sample in samples:
            writer.write(sample)
    return writer.index
