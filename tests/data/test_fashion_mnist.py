"""Fashion-MNIST's files, as Debian installs them."""

from __future__ import annotations

import gzip
import io
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mhla_lightning.data.index import read_index
from mhla_lightning.data.prepare.pack import pack
from mhla_lightning.data.prepare.sources import missing_source, open_sample_source
from mhla_lightning.data.split import Split
from mhla_lightning.data.stores import LocalStore
from mhla_lightning.errors import DataError
from tests.helpers.errors import refused

COUNTS = {"train": 7, "t10k": 3}


def write_set(folder: Path) -> dict[str, np.ndarray]:
    """Write the four files with a few random images; return these by prefix."""
    pixels = {}
    for prefix, count in COUNTS.items():
        rng = np.random.default_rng(count)
        pixels[prefix] = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        images = struct.pack(">4I", 0x0803, count, 28, 28) + pixels[prefix].tobytes()
        labels = struct.pack(">2I", 0x0801, count) + bytes(n % 10 for n in range(count))
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
        (folder / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    return pixels


def test_pixels_labels_and_splits_are_kept(tmp_path: Path) -> None:
    pixels = write_set(tmp_path)
    pack(f"fashion_mnist:{tmp_path}", tmp_path / "shards")
    for split, prefix in (("train", "train"), ("val", "t10k")):
        index = read_index(tmp_path / "shards" / split)
        assert index.classes[9] == "Ankle boot"
        samples = Split(index, LocalStore(tmp_path / "shards" / split)).read(range(COUNTS[prefix]))
        assert len(samples) == COUNTS[prefix]
        for sample in samples:
            number = int(sample["__key__"].rpartition("-")[2])
            assert int(sample["cls"]) == number % 10
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(sample["png"]))), pixels[prefix][number])


def test_a_missing_file_is_refused_with_the_package_to_install(tmp_path: Path) -> None:
    write_set(tmp_path)
    assert missing_source(f"fashion_mnist:{tmp_path}") is None
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    assert "t10k-labels" in (missing_source(f"fashion_mnist:{tmp_path}") or "")
    with refused("source") as error:
        open_sample_source(f"fashion_mnist:{tmp_path}")
    assert "apt-get install dataset-fashion-mnist" in error.value.reason


@pytest.mark.parametrize(
    "content",
    [
        b"no gzip",
        gzip.compress(b""),
        gzip.compress(struct.pack(">4I", 0x0803, 7, 28, 28) + bytes(100)),
        gzip.compress(struct.pack(">4I", 0x0803, 7, 28, 28) + bytes(7 * 784 + 1)),
        gzip.compress(struct.pack(">4I", 0x0803, 7, 14, 14) + bytes(7 * 196)),
        gzip.compress(struct.pack(">4I", 0x0803, 2**32 - 1, 28, 28)),
        gzip.compress(struct.pack(">4I", 0x0801, 7, 28, 28) + bytes(7 * 784)),
        gzip.compress(struct.pack(">4I", 0x0803, 7, 28, 28) + bytes(7 * 784))[:-30],
    ],
    ids=["text", "empty", "short", "long", "small images", "huge header", "other kind", "cut"],
)
def test_a_damaged_file_is_refused_by_name(content: bytes, tmp_path: Path) -> None:
    write_set(tmp_path)
    file = tmp_path / "train-images-idx3-ubyte.gz"
    file.write_bytes(content)
    with refused(str(file), DataError):
        open_sample_source(f"fashion_mnist:{tmp_path}")


def test_labels_must_fit_the_images(tmp_path: Path) -> None:
    write_set(tmp_path)
    other = struct.pack(">2I", 0x0801, 6) + bytes(6)
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(other))
    with refused(str(tmp_path), DataError):
        open_sample_source(f"fashion_mnist:{tmp_path}")
