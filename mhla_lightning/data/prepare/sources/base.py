"""What every source gives."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from PIL import Image

from mhla_lightning.data.index import ShardIndex
from mhla_lightning.data.prepare.samples import Sample
from mhla_lightning.errors import DataError


class Part(Protocol):
    """Samples in a fixed order: a split of a source."""

    def __len__(self) -> int:
        """Number of samples."""

    def take(self, positions: Sequence[int]) -> Iterable[Sample]:
        """The samples at these positions, in this order. Picklable, so that a worker process can read
        them. Raises DataError when it is read.
        """


@dataclass(frozen=True)
class Source:
    """Something to pack.

    header: what the index will say of the samples; its shards are ignored. parts: the splits that the source
        has of its own, "train" always, "val"
    and "test" perhaps. fingerprint: changes when the samples change; a packing that was interrupted is
    continued only when it is the same.
    lengths: tokens a row of the splits that have others than the header says. files: what lies beside the
        splits, by file name.
    """

    header: ShardIndex
    parts: dict[str, Part]
    fingerprint: str
    lengths: dict[str, int] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)

    def header_of(self, split: str) -> ShardIndex:
        """What the index of a split will say."""
        return replace(self.header, length=self.lengths.get(split, self.header.length))


def png_bytes(image: Image.Image) -> bytes:
    """An image as PNG: grayscale stays grayscale, everything else becomes RGB."""
    buffer = io.BytesIO()
    image.convert("L" if image.mode in ("1", "L") else "RGB").save(buffer, format="PNG")
    return buffer.getvalue()


def files_fingerprint(root: Path, files: Iterable[Path]) -> str:
    """sha256 over the names, sizes and times of files below `root`."""
    digest = hashlib.sha256()
    for path in files:
        try:
            stat = path.stat()
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror}): repair or remove it") from error
        digest.update(
            f"{path.relative_to(root)}\0{stat.st_size} {stat.st_mtime_ns}\n".encode(errors="surrogateescape")
        )
    return digest.hexdigest()
