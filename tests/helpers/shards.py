"""What lies in shards and folders that a test has made."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from mhla_lightning.data.index import read_index
from mhla_lightning.data.members import RawSample
from mhla_lightning.data.split import Split
from mhla_lightning.data.stores import LocalStore


def samples(split: Path) -> list[RawSample]:
    """Return all samples of a folder of shards, in order."""
    found = Split(read_index(split), LocalStore(split))
    return found.read(range(found.samples))


def array(sample: RawSample, name: str) -> np.ndarray:
    """Return the array of a sample's `NAME.npy`."""
    return np.load(io.BytesIO(sample[f"{name}.npy"]), allow_pickle=False)


def content(folder: Path) -> dict[str, bytes]:
    """Return the bytes of all files below a folder, by their place in it."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
