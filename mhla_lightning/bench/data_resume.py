"""How long training waits for its first batch when it resumes deep inside a large data set."""

from __future__ import annotations

import hashlib
import io
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from webdataset.writer import TarWriter

from mhla_lightning.data.index import ShardEntry, ShardIndex, offsets_path, write_index
from mhla_lightning.data.members import scan_shard
from mhla_lightning.data.modules.images import ImageDataModule
from mhla_lightning.data.modules.options import ReadingConfig
from mhla_lightning.data.transforms import Augmentation

_KEY = "00000000-"  # the shard's number goes here
_CHECKSUM = slice(148, 156)


def make_many(folder: Path, shards: int, samples: int, on_shard: Callable[[], object]) -> None:
    """Write `shards` tar files of `samples` images of 8 x 8 pixels each to folder/train.

    webdataset writes one; the others differ in their keys.
    """
    split = folder / "train"
    split.mkdir(parents=True)
    template, offsets = _template(samples)
    entries = []
    for number in range(shards):
        data, name = _renamed(template, offsets, number), f"train-{number:06d}.tar"
        (split / name).write_bytes(data)
        np.save(offsets_path(split, name), offsets, allow_pickle=False)
        entries.append(ShardEntry(name, samples, len(data), hashlib.sha256(data).hexdigest()))
        on_shard()
    write_index(split, ShardIndex("images", tuple(entries), ("0", "1")))


def measure_resume(folder: Path, position: int, workers: int) -> dict[str, Any]:
    """Measure the time from a data module at `position` to its first batch, and the memory.

    Time is in seconds; memory is the anonymous memory of this process and of its workers.
    """
    plain = Augmentation(auto_augment=None, re_prob=0.0, color_jitter=None)
    reading = ReadingConfig(num_workers=workers)
    module = ImageDataModule(str(folder), batch_size=256, image_size=8, augmentation=plain, reading=reading)
    state = {"consumed": position}
    others, before, start = set(_children()), anonymous_bytes(os.getpid()), time.perf_counter()
    module.load_state_dict(state)
    batch = next(iter(module.train_dataloader()))
    seconds = time.perf_counter() - start
    children = [anonymous_bytes(pid) for pid in set(_children()) - others]
    expected = [place.index for place in module.corpus.locate(np.arange(position, position + 256))]
    if batch["index"].tolist() != expected:
        raise RuntimeError("the first batch is not the one at this position")
    module.teardown("fit")
    return {
        "samples": module.samples,
        "shards": len(module.index().shards),
        "position": position,
        "workers": workers,
        "seconds": seconds,
        "process_bytes": anonymous_bytes(os.getpid()) - before,
        "worker_bytes": max(children, default=0),
    }


def anonymous_bytes(pid: int) -> int:
    """Anonymous resident memory (RssAnon) of a process in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def _children() -> list[int]:
    text = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text()
    return [int(pid) for pid in text.split()]


def _template(samples: int) -> tuple[bytes, np.ndarray]:
    image, tar = io.BytesIO(), io.BytesIO()
    Image.new("L", (8, 8)).save(image, format="PNG")
    with TarWriter(
        tar, user="mhla", group="mhla", mode=0o444, mtime=0, encoder=False, compress=False
    ) as writer:
        for number in range(samples):
            writer.write(
                {"__key__": f"{_KEY}{number:06d}", "png": image.getvalue(), "cls": str(number % 2).encode()}
            )
    data = tar.getvalue()
    return data, scan_shard(io.BytesIO(data), "template").offsets


def _renamed(template: bytes, offsets: np.ndarray, shard: int) -> bytes:
    """Return the template with another shard's number in every key and matching checksums."""
    data = np.frombuffer(template, np.uint8).copy()
    starts = np.concatenate([offsets[:-1], offsets[:-1] + 1024])  # a sample is two members of one block each
    digits = np.frombuffer(f"{shard:08d}".encode(), np.uint8)
    headers = data[starts[:, None] + np.arange(512)]
    headers[:, :8] = digits
    headers[:, _CHECKSUM] = ord(" ")
    for header, total in zip(headers, headers.sum(axis=1, dtype=np.int64), strict=True):
        header[_CHECKSUM] = np.frombuffer(f"{total:06o}\0 ".encode(), np.uint8)
    data[starts[:, None] + np.arange(512)] = headers
    return data.tobytes()
