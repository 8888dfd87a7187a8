"""Batches of images out of shards: an endless training stream and a one-pass validation stream. Both run inside DataLoader workers.

Rank and world size are given, never read from the environment: a spawned or forkserver worker sees no process group there, and every rank would
read everything.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import TypedDict

import torch
import webdataset as wds
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from mhla_lightning.data.batching import deal_shards, eval_ranges
from mhla_lightning.data.decode import BadSample, SkipMeter, decode
from mhla_lightning.data.index import ShardIndex
from mhla_lightning.data.reading import RawSample, read_range, read_shard
from mhla_lightning.data.transforms import Transform
from mhla_lightning.errors import DataError
from mhla_lightning.randomness import sample_rng


class Batch(TypedDict):
    """What every image task gets. weight is 0 for padding; skipped counts the samples that this worker left out since its previous batch."""

    key: list[str]
    index: Tensor  # int64 (B,), global index in the split, -1 for padding
    epoch: Tensor  # int64 (B,)
    weight: Tensor  # float32 (B,)
    image: Tensor  # float32 (B, C, H, W)
    label: Tensor  # int64 (B,)
    skipped: Tensor  # int64 ()


@dataclass(frozen=True, slots=True)
class Row:
    """One sample of a batch."""

    key: str
    index: int
    epoch: int
    weight: float
    image: Tensor
    label: int


def collate(rows: list[Row], skipped: int) -> Batch:
    """Stack B rows into a batch."""
    return Batch(
        key=[row.key for row in rows],
        index=torch.tensor([row.index for row in rows]),
        epoch=torch.tensor([row.epoch for row in rows]),
        weight=torch.tensor([row.weight for row in rows]),
        image=torch.stack([row.image for row in rows]),
        label=torch.tensor([row.label for row in rows]),
        skipped=torch.tensor(skipped),
    )


@dataclass
class TrainStream(IterableDataset[Batch]):
    """Endless batches of `batch_size` samples: epoch after epoch, each a permutation of all samples given by (seed, epoch).

    Shards are permuted and dealt to rank x worker, samples mixed in a buffer of `shuffle_buffer`. A batch may span two epochs; nothing is dropped
    or repeated. Raises DataError for too few shards, a shard that ends early, and too many samples that cannot be decoded.
    """

    split_dir: Path
    index: ShardIndex
    transform: Transform
    batch_size: int
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    first_epoch: int = 0
    shuffle_buffer: int = 2048
    max_skipped_share: float = 0.01

    def __iter__(self) -> Iterator[Batch]:
        """Batches for the worker that asks."""
        worker, workers = _this_worker()
        meter = SkipMeter(self.max_skipped_share)
        rows = self._rows(worker, workers, meter)
        while True:
            yield collate(list(islice(rows, self.batch_size)), meter.take())

    def _rows(self, worker: int, workers: int, meter: SkipMeter) -> Iterator[Row]:
        for epoch in count(self.first_epoch):
            rng = random.Random(f"{self.seed}/buffer/{epoch}/{self.rank}/{worker}")
            mix = wds.shuffle(self.shuffle_buffer, initial=self.shuffle_buffer, rng=rng)
            for sample in mix(self._samples(epoch, worker, workers)):
                try:
                    yield self._row(sample, epoch)
                except BadSample as reason:
                    meter.bad(sample, reason)
                else:
                    meter.good()
            meter.judge()

    def _samples(self, epoch: int, worker: int, workers: int) -> Iterator[RawSample]:
        order = list(range(len(self.index.shards)))
        random.Random(f"{self.seed}/shards/{epoch}").shuffle(order)
        mine = deal_shards(order, self.rank, self.world_size, worker, workers)
        if not mine:  # an epoch without samples would never end
            raise DataError(f"{self.split_dir} has {len(order)} shards, fewer than {self.world_size} ranks x {workers} workers")
        firsts = self.index.first_indices()
        for shard in mine:
            entry = self.index.shards[shard]
            yield from read_shard(self.split_dir / entry.name, entry.samples, first_index=firsts[shard])

    def _row(self, sample: RawSample, epoch: int) -> Row:
        image, label = decode(sample, len(self.index.classes))
        with sample_rng(self.seed, "augmentation", epoch, sample["__index__"]):
            return Row(sample["__key__"], sample["__index__"], epoch, 1.0, self.transform(image), label)


@dataclass
class EvalStream(IterableDataset[Batch]):
    """One pass over a split in order, in batches of exactly `batch_size`; every rank yields the same number of them (see batching.eval_ranges).

    A slot without a sample, or with one that cannot be decoded, is padding: a zero image with weight 0, label 0 and index -1.
    image_size: (height, width) that `transform` gives. Raises DataError like TrainStream.
    """

    split_dir: Path
    index: ShardIndex
    transform: Transform
    batch_size: int
    image_size: tuple[int, int]
    rank: int = 0
    world_size: int = 1
    max_skipped_share: float = 0.01

    def __iter__(self) -> Iterator[Batch]:
        """Batches for the worker that asks."""
        meter = SkipMeter(self.max_skipped_share)
        ranges = eval_ranges(self.index.samples, self.batch_size, self.rank, self.world_size, *_this_worker())
        for number, (start, stop) in enumerate(ranges, start=1):
            rows = [self._row(sample, meter) for sample in read_range(self.split_dir, self.index, start, stop)]
            rows += [self._padding()] * (self.batch_size - len(rows))
            if number == len(ranges):  # before the last batch: nobody asks a sized loader for more
                meter.judge()
            yield collate(rows, meter.take())

    def _row(self, sample: RawSample, meter: SkipMeter) -> Row:
        try:
            image, label = decode(sample, len(self.index.classes))
        except BadSample as reason:
            meter.bad(sample, reason)
            return self._padding()
        meter.good()
        return Row(sample["__key__"], sample["__index__"], 0, 1.0, self.transform(image), label)

    def _padding(self) -> Row:
        return Row("", -1, 0, 0.0, torch.zeros(3, *self.image_size), 0)


def _this_worker() -> tuple[int, int]:
    info = get_worker_info()
    return (info.id, info.num_workers) if info else (0, 1)
