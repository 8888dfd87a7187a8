"""Data sets to measure on: JPEG images of smooth random content, and rows of random tokens."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from mhla_lightning.data.index import ShardIndex
from mhla_lightning.data.prepare.samples import Sample, image_sample, token_samples
from mhla_lightning.data.prepare.writer import write_split

VOCABULARY = 50257  # GPT-2's: two bytes a token
SHARDS = 16
_CLASSES = tuple(map(str, range(10)))
_ROWS_AT_ONCE = 1024


class TokenFiles(NamedTuple):
    """The same rows twice: as shards, and as two flat files of uint16 (rows, length)."""

    split: Path
    tokens: Path
    documents: Path
    length: int


def write_images(folder: Path, samples: int, side: int) -> Path:
    """Write a data folder with `samples` JPEG training images in about 16 shards.

    Images have side x side pixels.
    """
    header, rng = ShardIndex("images", (), _CLASSES), np.random.default_rng(0)
    images = (image_sample(header, f"{n}", _jpeg(rng, side), n % len(_CLASSES)) for n in range(samples))
    size = (
        len(_jpeg(np.random.default_rng(0), side)) + 4 * tarfile.BLOCKSIZE
    )  # two headers, the label, and half a block that is not full
    folder.mkdir()
    write_split(folder / "train", header, images, shard_bytes=samples * size // SHARDS)
    return folder


def _jpeg(rng: np.random.Generator, side: int) -> bytes:
    """Return a JPEG of enlarged noise of two scales.

    Flat images and plain noise decode at another speed than photographs.
    """
    image = np.zeros((side, side, 3))
    for cells, strength in ((6, 90.0), (side // 4, 30.0)):
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8)).resize(
            (side, side), Image.Resampling.BICUBIC
        )
        image += (np.asarray(noise, dtype=np.float64) / 127.5 - 1) * strength
    buffer = io.BytesIO()
    Image.fromarray(np.clip(image + 128, 0, 255).astype(np.uint8)).save(buffer, format="JPEG", quality=90)
    return buffer.getvalue()


def write_tokens(folder: Path, rows: int, length: int) -> TokenFiles:
    """Write `rows` rows of `length` random tokens in about 16 shards and in two flat files.

    Each row holds a few documents.
    """
    header = ShardIndex("tokens", (), tokenizer="random", length=length)
    files = TokenFiles(folder / "train", folder / "tokens.u16", folder / "documents.u16", length)
    folder.mkdir()
    with open(files.tokens, "wb") as tokens, open(files.documents, "wb") as documents:

        def blocks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for block in _token_blocks(rows, length):
                tokens.write(block[0].tobytes())
                documents.write(block[1].tobytes())
                yield block

        write_split(
            files.split,
            header,
            _members(header, blocks(), rows, length),
            shard_bytes=max(1, rows * length * 4 // SHARDS),
        )
    return files


def _members(
    header: ShardIndex, blocks: Iterator[tuple[np.ndarray, np.ndarray]], rows: int, length: int
) -> Iterator[Sample]:
    return token_samples(
        header, blocks, VOCABULARY, member_bytes=max(1, min(2**23, rows * length * 2 // SHARDS))
    )


def _token_blocks(rows: int, length: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    for first in range(0, rows, _ROWS_AT_ONCE):
        shape = min(_ROWS_AT_ONCE, rows - first), length
        ends = rng.random(shape) < 1 / 512  # a document has 512 tokens on average
        yield rng.integers(0, VOCABULARY, shape, dtype=np.uint16), np.cumsum(ends, axis=1).astype(np.uint16)
