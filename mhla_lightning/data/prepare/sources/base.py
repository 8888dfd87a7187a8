"""The form that all sources share."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from PIL import Image

from mhla_lightning.data.index import ShardIndex
from mhla_lightning.data.pixels import eight_bits
from mhla_lightning.data.prepare.samples import Sample
from mhla_lightning.errors import DataError


class SourcePart(Protocol):
    """Samples in a fixed order: a split of a source."""

    def __len__(self) -> int:
        """Return the number of samples."""

    def take(self, positions: Sequence[int]) -> Iterable[Sample]:
        """Return the samples at these positions, in this order.

        The result can be pickled, so that a worker process can read it. Reading it may raise DataError.
        """


@dataclass(frozen=True)
class SampleSource:
    """Samples to pack.

    Args:
        header: an index that describes the samples; its shards are ignored.
        parts: the splits of the source: always train, perhaps val and test.
        fingerprint: changes when the samples change; an interrupted packing continues only with the same.
        lengths: tokens a row, for splits with another length than the header's.
        files: content of the files beside the splits, by file name.
    """

    header: ShardIndex
    parts: dict[str, SourcePart]
    fingerprint: str
    lengths: dict[str, int] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)

    def header_of(self, split: str) -> ShardIndex:
        """Return an index that describes the samples of a split."""
        return replace(self.header, length=self.lengths.get(split, self.header.length))


def png_bytes(image: Image.Image) -> bytes:
    """Encode upright pixels of 8 bits as PNG.

    Grayscale stays grayscale, everything else becomes RGB. Raises BadImage (see pixels.eight_bits).
    """
    buffer = io.BytesIO()
    eight_bits(image).image.save(buffer, format="PNG")
    return buffer.getvalue()


def files_fingerprint(root: Path, files: Iterable[Path]) -> str:
    """Return a sha256 of the names, sizes and times of files below `root`."""
    digest = hashlib.sha256()
    for path in files:
        try:
            stat = path.stat()
        except OSError as error:
            raise DataError(str(path), f"cannot be read ({error.strerror}); repair or remove it") from error
        digest.update(
            f"{path.relative_to(root)}\0{stat.st_size} {stat.st_mtime_ns}\n".encode(errors="surrogateescape")
        )
    return digest.hexdigest()
