"""The data pipeline beside its parts: decoder, webdataset's own pipeline, numpy's memmap.

Cases take turns, as in timing.py.
Every case is a loader with the same number of workers and the same prefetch.
All make the same batches from bytes that the page cache holds:

- stream: TrainStream, as training reads.
- decoder: the same samples in the same order are in memory, undecoded. A loop decodes, augments (with the
  sample's random numbers) and collates them.
- webdataset: wds.WebDataset over the same tar files, shuffled shards and a shuffle buffer, then the same
  decoding, augmentation and collation.
- memmap: tokens and documents are an np.memmap of uint16 each. For the same rows in the same order,
  torch.from_numpy(array[row].astype(np.int64)) and torch.stack make these two tensors alone.
  Nothing is checked, and there are no keys, indices, epochs and weights.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset as wds
from torch.utils.data import IterableDataset, get_worker_info

from mhla_lightning.bench.data_samples import TokenFiles
from mhla_lightning.data.batching import RankPart
from mhla_lightning.data.corpus import SamplePlace, TrainCorpus
from mhla_lightning.data.kinds import Kind
from mhla_lightning.data.loader import build_loader, shut_down
from mhla_lightning.data.members import RawSample
from mhla_lightning.data.skips import BadSample
from mhla_lightning.data.stream import Batch, BatchRow, TrainStream, collate
from mhla_lightning.errors import DataError

SHUFFLE_BUFFER = 1000  # samples; webdataset's own default
WARM_UP = 2  # batches of every worker that are not timed at the beginning of a turn


@dataclass(frozen=True)
class LoaderPlan:
    """How much is read, and by how many workers.

    Batches are of one worker in a turn. Turns are those that are timed; one more warms up.
    """

    batch_size: int
    batches: int
    workers: int
    turns: int

    @property
    def steps(self) -> int:
        """Batches of a turn."""
        return self.batches * max(1, self.workers)

    @property
    def samples(self) -> int:
        """Samples of a turn."""
        return self.steps * self.batch_size

    @property
    def part(self) -> RankPart:
        """What the one rank reads."""
        return RankPart(0, 1, self.batch_size, self.batch_size)


@dataclass
class DataCase:
    """One way to read.

    Rates are samples/s of every turn. Read counts the samples of all turns, the warm-up included.
    """

    subject: str
    name: str
    plan: LoaderPlan
    loader: wds.WebLoader
    rates: list[float] = field(default_factory=list)
    read: int = 0

    def row(self) -> dict[str, Any]:
        """As the table and the JSON file show it; samples_per_second is the median over the turns."""
        return {
            "subject": self.subject,
            "case": self.name,
            "samples_per_second": statistics.median(self.rates),
            "slowest": min(self.rates),
            "fastest": max(self.rates),
            "turns": len(self.rates),
            "samples_a_turn": self.plan.samples,
            "samples_read": self.read,
        }


@dataclass
class _Turns(IterableDataset[Batch]):
    """An endless stream in passes of `batches` batches, each after the last.

    So nothing works ahead in the turn of another case.
    """

    stream: Iterable[Batch]
    batches: int
    _running: Iterator[Batch] | None = None

    def __iter__(self) -> Iterator[Batch]:
        if self._running is None:
            self._running = iter(self.stream)
        yield from islice(self._running, self.batches)


def make_case(subject: str, name: str, plan: LoaderPlan, stream: Iterable[Batch]) -> DataCase:
    """A case that reads `stream`, whose iterator runs without end in each of the plan's workers."""
    return DataCase(subject, name, plan, build_loader(_Turns(stream, plan.batches), plan.workers))


def take_turns(cases: Sequence[DataCase], on_turn: Callable[[], None]) -> None:
    """Time all cases in turn, forwards and backwards, after a warm-up; then end their workers."""
    try:
        for turn in range(cases[0].plan.turns + 1):
            for case in cases if turn % 2 else reversed(cases):
                rate = _samples_per_second(case)
                if turn > 0:
                    case.rates.append(rate)
                on_turn()
    finally:
        for case in cases:
            shut_down(case.loader)


def _samples_per_second(case: DataCase) -> float:
    untimed = WARM_UP * max(1, case.plan.workers)
    start = end = 0.0
    for number, batch in enumerate(case.loader, start=1):
        end = time.perf_counter()
        case.read += len(next(value for value in batch.values() if isinstance(value, torch.Tensor)))
        if number == untimed:
            start = end
    return (case.plan.steps - untimed) * case.plan.batch_size / (end - start)


# The streams to compare


def own_stream(corpus: TrainCorpus, kind: Kind, plan: LoaderPlan) -> TrainStream:
    """As training reads."""
    return TrainStream(corpus, kind, plan.part)


def _places(corpus: TrainCorpus, plan: LoaderPlan) -> list[list[SamplePlace]]:
    """The samples of every batch of all turns."""
    return [corpus.locate(plan.part.positions(step)) for step in range(plan.steps * (plan.turns + 1))]


@dataclass
class DecoderLoop:
    """Batches from raw samples in memory. places: of every batch. samples: by index."""

    kind: Kind
    places: Sequence[Sequence[SamplePlace]]
    samples: Mapping[int, RawSample]

    def __iter__(self) -> Iterator[Batch]:
        for places in islice(self.places, *_this_worker()):
            yield collate([_decoded(self.kind, self.samples[place.index], place) for place in places], 0)


def decoder_loop(corpus: TrainCorpus, kind: Kind, plan: LoaderPlan) -> DecoderLoop:
    """The batches of the stream, from memory: all samples of the turns are read into it first."""
    places = _places(corpus, plan)
    indices = sorted({place.index for batch in places for place in batch})
    return DecoderLoop(kind, places, dict(zip(indices, corpus.read(kind, indices), strict=True)))


def _decoded(kind: Kind, sample: RawSample, place: SamplePlace) -> BatchRow:
    try:
        tensors = kind.train(sample | {"__index__": place.index}, place.epoch)
    except BadSample as reason:
        raise DataError(
            sample["__url__"],
            f"sample {sample['__key__']} cannot be decoded ({reason}); measure on data without damage",
        ) from reason
    return BatchRow(sample["__key__"], place.index, place.epoch, place.source, 1.0, tensors)


def webdataset_pipeline(folder: Path, shards: Sequence[str], kind: Kind, plan: LoaderPlan) -> Iterable[Batch]:
    """webdataset's own pipeline over the tar files of a local folder."""
    urls = [str(folder / name) for name in shards]
    samples = wds.WebDataset(urls, shardshuffle=len(urls)).shuffle(SHUFFLE_BUFFER).map(_Decode(kind)).repeat()
    return wds.DataPipeline(
        samples, wds.batched(plan.batch_size, collation_fn=partial(collate, skipped=0))
    )  # repeated inside: no short batches


@dataclass
class _Decode:
    kind: Kind
    _number: int = 0

    def __call__(self, sample: RawSample) -> BatchRow:
        self._number += 1
        return _decoded(self.kind, sample, SamplePlace(0, 0, self._number))


@dataclass
class MemmapLoop:
    """Batches from flat files. places: of every batch."""

    files: TokenFiles
    places: Sequence[Sequence[SamplePlace]]

    def __iter__(self) -> Iterator[Batch]:
        tokens, documents = (
            np.memmap(path, np.uint16, "r").reshape(-1, self.files.length) for path in self.files[1:3]
        )
        for places in islice(self.places, *_this_worker()):
            rows = [place.index for place in places]
            yield {
                "tokens": torch.stack([torch.from_numpy(tokens[row].astype(np.int64)) for row in rows]),
                "documents": torch.stack([torch.from_numpy(documents[row].astype(np.int64)) for row in rows]),
            }


def memmap_loop(corpus: TrainCorpus, plan: LoaderPlan, files: TokenFiles) -> MemmapLoop:
    """The rows of the stream, in its order."""
    return MemmapLoop(files, _places(corpus, plan))


def _this_worker() -> tuple[int, None, int]:
    """Start, stop and step of what this worker takes of a sequence of batches."""
    info = get_worker_info()
    return (info.id, None, info.num_workers) if info else (0, None, 1)
