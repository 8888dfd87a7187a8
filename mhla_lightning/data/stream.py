"""Batches from shards: an endless training stream and a one-pass validation stream.

Both run in DataLoader workers.
Rank and world size are arguments, never read from the environment. A spawned or forkserver worker sees no
process group there, and every rank would read everything.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from mhla_lightning.data.ahead import Draw
from mhla_lightning.data.batching import RankPart, eval_batches_per_rank, grouped_eval_ranges
from mhla_lightning.data.corpus import Corpus, SamplePlace, TrainCorpus
from mhla_lightning.data.kinds import Kind
from mhla_lightning.data.members import RawSample
from mhla_lightning.data.skips import JUDGED_AFTER, BadSample, SkipMeter
from mhla_lightning.data.transport import LightBatch
from mhla_lightning.errors import DataError

# key: list[str]. index, epoch, source: int64 (B,); index is -1 for padding. weight: float32 (B,); 0 for
# padding. skipped: int64 (), samples that this worker skipped since its previous batch. And the tensors of
# the kind, (B, ...) each.
Batch = dict[str, Any]


@dataclass(slots=True)
class BatchRow:
    """One sample of a batch."""

    key: str
    index: int
    epoch: int
    source: int
    weight: float
    tensors: dict[str, Tensor]


def collate(rows: Sequence[BatchRow], skipped: int, together: dict[str, Tensor] | None = None) -> Batch:
    """Stack B rows into a batch.

    together: the tensors of all rows, (B, ...) each, when they were made at once; the rows then hold none.
    """
    return LightBatch(
        key=[row.key for row in rows],
        index=_column([row.index for row in rows], np.int64),
        epoch=_column([row.epoch for row in rows], np.int64),
        source=_column([row.source for row in rows], np.int64),
        weight=_column([row.weight for row in rows], np.float32),
        skipped=torch.tensor(skipped),
        **(together or {name: torch.stack([row.tensors[name] for row in rows]) for name in rows[0].tensors}),
    )


def _column(values: Sequence[float], dtype: type) -> Tensor:
    return torch.from_numpy(np.array(values, dtype=dtype))  # a fifth of torch.tensor's time


@dataclass
class TrainStream(IterableDataset[Batch]):
    """The endless batches of one rank; worker t mod workers reads micro batch t.

    A sample that cannot be decoded is counted, and its slot takes the next good sample of the sequence. So
    batches stay full, and equal for every number of ranks and workers. Raises DataError for shards that
    cannot be read and for too many bad samples.

    Args:
        corpus: training data in its order.
        kind: of all samples.
        part: positions of this rank.
        max_skipped_share: largest share of bad samples.
        kinds: one for every source instead of `kind`, where every batch is of one source (Mixture.group) and
            shapes may differ.
        draw: adds random numbers to every batch; None adds none.
    """

    corpus: TrainCorpus
    kind: Kind
    part: RankPart
    max_skipped_share: float = 0.01
    kinds: Sequence[Kind] = ()
    draw: Draw | None = None

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of this worker."""
        worker, workers = _this_worker()
        own_samples = -(-self.corpus.samples // (self.part.world_size * workers))
        meter = SkipMeter(self.max_skipped_share, min(JUDGED_AFTER, own_samples))
        for step in count(worker, workers):
            positions = self.part.positions(step)
            if positions[-1] >= self.corpus.mixture.length:  # prefetched beyond the end of a mixture
                return
            yield _with_draws(self._batch(positions, meter), self.draw)

    def _batch(self, positions: np.ndarray, meter: SkipMeter) -> Batch:
        places = self.corpus.locate(positions)
        kind = self._kind(places[0])
        samples = self.corpus.read(kind, [place.index for place in places])
        together = kind.train_batch(samples, [place.epoch for place in places])
        if together is None:
            return collate(self._rows(positions, places, samples, meter), meter.take())
        meter.read += len(samples)
        rows = [
            BatchRow(sample["__key__"], place.index, place.epoch, place.source, 1.0, {})
            for place, sample in zip(places, samples, strict=True)
        ]
        return collate(rows, meter.take(), together)

    def _rows(
        self,
        positions: np.ndarray,
        places: Sequence[SamplePlace],
        samples: Sequence[RawSample],
        meter: SkipMeter,
    ) -> list[BatchRow]:
        rows = []
        for position, place, sample in zip(positions.tolist(), places, samples, strict=True):
            try:
                rows.append(self._row(place, sample))
                meter.good()
            except BadSample as reason:
                meter.bad(sample, reason)
                rows.append(self._substitute(position, place.source, meter))
        return rows

    def _row(self, place: SamplePlace, sample: RawSample) -> BatchRow:
        return BatchRow(
            sample["__key__"],
            place.index,
            place.epoch,
            place.source,
            1.0,
            self._kind(place).train(sample, place.epoch),
        )

    def _kind(self, place: SamplePlace) -> Kind:
        return self.kinds[place.source] if self.kinds else self.kind

    def _substitute(self, position: int, source: int, meter: SkipMeter) -> BatchRow:
        after = range(position + 1, int(min(position + 1 + JUDGED_AFTER, self.corpus.mixture.length)))
        # For the last sample of a mixture that ends.
        before = range(position - 1, max(-1, position - 1 - JUDGED_AFTER), -1)
        for place in self.corpus.locate(np.array([*after, *before], dtype=np.int64)):
            if self.kinds and place.source != source:  # of another shape
                continue
            (sample,) = self.corpus.read(self._kind(place), [place.index])
            try:
                return self._row(place, sample)
            except BadSample:  # counted at its own position
                continue
        meter.judge()
        raise DataError(
            self.corpus.sources[source].path,
            f"none of the samples around position {position} can be decoded: run 'mhla data verify'",
        )


@dataclass
class EvalStream(IterableDataset[Batch]):
    """One pass over splits in order, with the same number of full batches on every rank.

    A slot without a sample, or with one that cannot be decoded, is padding: weight 0, index -1, and the
    kind's padding. See batching.eval_ranges. Raises DataError as TrainStream does.

    Args:
        corpus: splits to read.
        kind: of all samples.
        batch_size: samples of a batch of one rank.
        rank: of the process.
        world_size: number of ranks.
        max_skipped_share: largest share of bad samples.
        kinds: one for every split instead of `kind`; no batch then holds samples of two splits.
        draw: adds random numbers to every batch; None adds none.
    """

    corpus: Corpus
    kind: Kind
    batch_size: int
    rank: int = 0
    world_size: int = 1
    max_skipped_share: float = 0.01
    kinds: Sequence[Kind] = ()
    draw: Draw | None = None

    @property
    def batches(self) -> int:
        """Batches that every rank yields in one pass."""
        return sum(
            eval_batches_per_rank(samples, self.batch_size, self.world_size) for samples in self._groups()
        )

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of this worker."""
        yield from self.read(self.ranges(*_this_worker()))

    def ranges(self, worker: int = 0, workers: int = 1) -> list[tuple[int, int, int]]:
        """Return the batches of a worker, as batching.grouped_eval_ranges."""
        return grouped_eval_ranges(
            self._groups(), self.batch_size, self.rank, self.world_size, worker, workers
        )

    def read(self, ranges: Sequence[tuple[int, int, int]]) -> Iterator[Batch]:
        """Yield these batches."""
        meter = SkipMeter(self.max_skipped_share)
        for number, (group, start, stop) in enumerate(ranges, start=1):
            kind = self.kinds[group] if self.kinds else self.kind
            rows = [self._row(kind, sample, meter) for sample in self.corpus.read(kind, range(start, stop))]
            rows += [self._padding(kind)] * (self.batch_size - len(rows))
            if number == len(ranges):  # before the last batch, because a sized loader stops there
                meter.judge()
            yield _with_draws(collate(rows, meter.take()), self.draw)

    def _groups(self) -> list[int]:
        """Return the sizes of the groups whose samples may share a batch."""
        return [split.samples for split in self.corpus.splits] if self.kinds else [self.corpus.samples]

    def _row(self, kind: Kind, sample: RawSample, meter: SkipMeter) -> BatchRow:
        index = sample["__index__"]
        try:
            row = BatchRow(
                sample["__key__"], index, 0, self.corpus.source_of(index), 1.0, kind.evaluate(sample)
            )
        except BadSample as reason:
            meter.bad(sample, reason)
            return self._padding(kind)
        meter.good()
        return row

    def _padding(self, kind: Kind) -> BatchRow:
        return BatchRow("", -1, 0, 0, 0.0, kind.padding())


@dataclass
class EvalPasses(IterableDataset[Batch]):
    """Several passes one after another, such as the same images at several sizes.

    Args:
        passes: of one rank.
    """

    passes: Sequence[EvalStream]

    @property
    def batches(self) -> int:
        """Batches that every rank yields in all passes."""
        return sum(one.batches for one in self.passes)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of this worker."""
        worker, workers = _this_worker()
        before = 0
        for one in self.passes:
            yield from one.read(one.ranges((worker - before) % workers, workers))
            before += one.batches


def _with_draws(batch: Batch, draw: Draw | None) -> Batch:
    if draw is not None:
        batch.update(draw(batch))
    return batch


def _this_worker() -> tuple[int, int]:
    info = get_worker_info()
    return (info.id, info.num_workers) if info else (0, 1)
