"""What the LightningDataModules of all kinds share: splits, order, position, loaders."""

from __future__ import annotations

import math
import os
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

import webdataset as wds
from lightning.pytorch import LightningDataModule
from lightning.pytorch.loops.progress import _ProcessedTracker

from mhla_lightning.data.batching import Part, split_batch
from mhla_lightning.data.check import Verify, check_split
from mhla_lightning.data.corpus import Corpus, Source, TrainCorpus
from mhla_lightning.data.index import FORMAT, INDEX_NAME, SPLITS, ShardIndex, read_index
from mhla_lightning.data.kinds import Kind
from mhla_lightning.data.loader import Loading, build_loader, shut_down
from mhla_lightning.data.split import Split
from mhla_lightning.data.stores import Remote, Store, open_store, with_cache
from mhla_lightning.data.stream import EvalStream, TrainStream
from mhla_lightning.errors import UserError, unknown_name

MixBy = Literal["sample", "batch"]


class _Place(NamedTuple):
    rank: int
    world_size: int


class ShardDataModule(LightningDataModule):
    """Batches from shards, in an order that is a function of (seed, position) alone.

    A run that was stopped goes on with the next sample on any number of ranks and workers: its whole state is
    `state_dict`, the same on every rank. Lightning keeps only rank 0's loader state, and webdataset's
    pipelines have none.

    Args:
        path: folder or address (http, https, s3, gs) that holds train/, val/ and perhaps test/; None when
            `mix` is given.
        batch_size: samples of one optimizer step, over all ranks.
        micro_batch_size: samples a rank takes at once; must divide its part of batch_size. None: the whole
            part.
        epochs: passes over the training data; `lightning run` turns it into trainer.max_steps. Nothing here
            reads it.
        num_workers: loader processes per rank; 0 loads in the training process.
        mix: several data sets instead of `path`.
        lanes: stretches of the shards that are read side by side; with a multiple of the ranks every rank
            reads shards of its own.
        window: largest number of samples that are mixed inside a lane.
        seed: of order and augmentation. None: the run's seed (PL_GLOBAL_SEED), else 0.
        max_skipped_share: share of samples that may be skipped because they cannot be decoded, per worker.
        verify: how `check` compares files with the index: auto, size, sha256 or none (see check.check_split).
        loading: how batches travel from the workers.
        remote: retries, time-outs and cache for shards that are not on this machine.
        mix_by: what of the mixture is of one source: each `sample`, or each `batch` of an optimizer step,
            which lets samples of the sources differ in shape (buckets of clips; images among videos).

    Attributes:
        consumed: training samples already consumed.
    """

    def __init__(
        self,
        path: str | None,
        batch_size: int,
        micro_batch_size: int | None,
        epochs: float | None,
        num_workers: int,
        mix: Sequence[Source] | None,
        lanes: int,
        window: int,
        seed: int | None,
        max_skipped_share: float,
        verify: Verify,
        loading: Loading | None,
        remote: Remote | None,
        mix_by: MixBy = "sample",
    ) -> None:
        """Store and validate the arguments. Raises UserError."""
        super().__init__()
        if (path is None) == (not mix):
            raise UserError("the recipe needs data.path or data.mix, one of the two")
        self.sources = tuple(mix or ()) or (Source(os.path.expanduser(str(path))),)
        self.batch_size, self.micro_batch_size, self.epochs = batch_size, micro_batch_size, epochs
        self.num_workers, self.lanes, self.window = num_workers, lanes, window
        self._seed, self.max_skipped_share, self.verify = seed, max_skipped_share, verify
        self.loading, self.remote, self.mix_by = loading or Loading(), remote or Remote(), mix_by
        self._start, self._start_step = (
            0,
            0,
        )  # samples consumed and optimizer steps done when the training loader was made
        self._restored: Mapping[str, Any] | None = None  # a state that no loader has taken up yet
        self._splits_read: dict[tuple[str, str], Split | None] = {}
        self._corpus: TrainCorpus | None = None
        self._loaders: list[wds.WebLoader] = []
        self._validate()

    def _validate(self) -> None:
        least = {"batch_size": 1, "num_workers": 0, "lanes": 1, "window": 1}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise UserError(f"data.{name} is {getattr(self, name)}; it must be at least {value}")
        if self.epochs is not None and not self.epochs > 0:
            raise UserError(f"data.epochs is {self.epochs}; it must be a number above 0")
        if not 0 <= self.max_skipped_share <= 1:
            raise UserError(f"data.max_skipped_share is {self.max_skipped_share}; it must be from 0 to 1")
        if self.mix_by not in get_args(MixBy):
            raise UserError(unknown_name("data.mix_by", self.mix_by, get_args(MixBy)))
        labels = [source.label for source in self.sources]
        for source in self.sources:
            if not (math.isfinite(source.weight) and source.weight > 0):
                raise UserError(
                    f"data.mix: the weight of {source.label} is {source.weight}; it must be a number above 0"
                )
            if labels.count(source.label) > 1:
                raise UserError(
                    f"data.mix: two sources are called {source.label}; give each a name of its own"
                )

    source: str | None = None  # what prepare_data makes shards of

    def is_ready(self) -> bool:
        """Whether there are shards to train on."""
        return all(self._store(source, "train").size(INDEX_NAME) is not None for source in self.sources)

    def _take_source(self, source: str | None, path: str | None) -> None:
        if source is not None and (path is None or "://" in path):
            raise UserError("data.source is packed into data.path, which must be a folder of this machine")
        self.source = source

    def prepare_data(self) -> None:
        """Pack `source` into `path` when there are no shards yet. Always with the same seed, so that the
        data's hash does not depend on the run's.
        """
        if self.source is None or self.is_ready():
            return
        try:
            self._pack(self.source, Path(self.sources[0].path))
        except UserError:
            if not self.is_ready():  # another process may have finished the same work first
                raise
        self._splits_read.clear()

    def _pack(self, source: str, folder: Path) -> None:
        raise UserError(f"{type(self).__name__} packs no data.source")

    @abstractmethod
    def kind(self, index: ShardIndex) -> Kind:
        """How samples of a split become tensors."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What a task must know of the data before training."""

    # What there is

    @property
    def path(self) -> str:
        """The path, or those of the mixture."""
        return ", ".join(source.path for source in self.sources)

    def split(self, name: str, source: Source) -> Split | None:
        """A split of a source, opened once; None when the source has none of this name. Raises DataError
        for one that cannot be read.
        """
        if (name, source.path) not in self._splits_read:
            store = self._store(source, name)
            found = None
            if name == "train" or store.size(INDEX_NAME) is not None:
                index = read_index(store)
                files = {shard.name: (shard.sha256, shard.bytes) for shard in index.shards}
                found = Split(index, with_cache(store, files, self.remote))
            self._splits_read[name, source.path] = found
        return self._splits_read[name, source.path]

    def _store(self, source: Source, split: str) -> Store:
        return open_store(f"{source.path.rstrip('/')}/{split}", self.remote)

    def splits(self, name: str) -> list[Split]:
        """A split of all sources that have it."""
        found = (self.split(name, source) for source in self.sources)
        return [split for split in found if split is not None]

    def index(self, split: str = "train") -> ShardIndex:
        """The index of a split of the first source that has it. Raises UserError when there is none."""
        splits = self.splits(split)
        if not splits:
            found = [name for name in SPLITS if self.splits(name)]
            raise UserError(f"{self.path} has no {split} split; splits: {', '.join(found)}")
        return splits[0].index

    @property
    def corpus(self) -> TrainCorpus:
        """The training data in its order."""
        if self._corpus is None:
            group = self.batch_size if self.mix_by == "batch" else 1
            self._corpus = TrainCorpus(
                self.splits("train"), self.sources, self.seed, self.lanes, self.window, group
            )
        return self._corpus

    @property
    def samples(self) -> int:
        """Training samples."""
        return sum(split.samples for split in self.splits("train"))

    @property
    def data_hash(self) -> str:
        """Identity of the training data (64 hex digits)."""
        return self.corpus.hash

    @property
    def seed(self) -> int:
        """The seed of order and augmentation."""
        return self._seed if self._seed is not None else int(os.environ.get("PL_GLOBAL_SEED", "0"))

    def micro_batch(self, world_size: int) -> tuple[int, int]:
        """(samples a rank takes at once, accumulation steps). Raises UserError when the batch does not
        divide.
        """
        return split_batch(self.batch_size, world_size, self.micro_batch_size)

    def check(self, world_size: int) -> None:
        """Everything that can be known to be wrong before training on `world_size` ranks. Raises UserError
        or DataError, one sentence.
        """
        self.micro_batch(world_size)
        for name in SPLITS:
            for split in self.splits(name):
                check_split(split, self.verify)
                self.kind(split.index).check(split.index, split.store.address(INDEX_NAME))
        if not self.splits("val"):
            raise UserError(f"{self.path} has no val split: pack the data with one, or put one beside train")

    # Where training stands

    @property
    def consumed(self) -> int:
        """Training samples already consumed."""
        if self._restored is not None:
            return int(self._restored["consumed"])
        steps = 0 if self.trainer is None else max(0, self.trainer.global_step - self._start_step)
        return self._start + steps * self.batch_size

    def consumed_by_source(self) -> dict[str, int]:
        """Training samples already consumed, by the source's name."""
        counts = self.corpus.mixture.counts(self.consumed)
        return {source.label: count for source, count in zip(self.sources, counts, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """The position in the sequence and what gives it a meaning; the same on every rank, written into
        every checkpoint.
        """
        consumed = self.consumed
        order = {"seed": self.seed, "lanes": self.lanes, "window": self.window, "data_hash": self.data_hash}
        if self.mix_by == "batch":  # the sequence then depends on the batch's size
            order |= {"mix_by": "batch", "batch_size": self.batch_size}
        return {"format": FORMAT, "epoch": consumed // self.samples, "consumed": consumed, **order}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take a position over. Whether it fits is asked when training asks for data: a checkpoint may be
        validated on any.
        """
        self._restored = dict(state_dict)

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Refuse a position in another sequence. Raises UserError."""
        own = {"mix_by": "sample"} | self.state_dict()
        state = {"mix_by": "sample"} | dict(
            state
        )  # which is not written, as it was before there was a choice
        for key in ("format", "seed", "lanes", "window", "data_hash", "mix_by", "batch_size"):
            if key in state and state[key] != own[key]:
                raise UserError(
                    f"the checkpoint's position belongs to data with {key} {state[key]}, and here it "
                    f"is {own[key]}:"
                    f" samples would be dropped and repeated; set data.{key} back, or start anew with --fresh"
                )

    # Loaders

    def train_dataloader(self) -> wds.WebLoader:
        """The endless sequence from where training stands, as long as trainer.max_steps needs (without a
        length when max_steps is -1).
        """
        place = self._place()
        micro, accumulation = self.micro_batch(place.world_size)
        if self._restored is not None:
            self.check_state(self._restored)
            self._align_progress(accumulation)
        self._start, self._start_step = self.consumed, 0 if self.trainer is None else self.trainer.global_step
        self._restored = None
        part = Part(place.rank, place.world_size, self.batch_size, micro, self._start)
        stream = TrainStream(
            self.corpus, self.kind(self.index()), part, self.max_skipped_share, self._kinds("train")
        )
        return self._loader(stream, self.num_workers, self._train_batches(accumulation))

    def _align_progress(self, accumulation: int) -> None:
        """Lightning counts micro batches, and a checkpoint of another number of ranks has counted others:
        the loop would end early and begin anew.
        """
        if self.trainer is None:
            return
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        batches = self.trainer.global_step * accumulation
        for counts in cast("Sequence[_ProcessedTracker]", (progress.total, progress.current)):
            behind = (
                counts.processed - counts.completed
            )  # by this Lightning knows at which hook the checkpoint was written
            counts.ready = counts.started = counts.processed = batches
            counts.completed = batches - behind

    def _train_batches(self, accumulation: int) -> int | None:
        if self.trainer is None:
            return None
        if self.trainer.accumulate_grad_batches != accumulation:
            raise UserError(
                f"trainer.accumulate_grad_batches is {self.trainer.accumulate_grad_batches}, but "
                "data.batch_size and data.micro_batch_size give"
                f" {accumulation}: leave it out, it follows from them"
            )
        steps = self.trainer.max_steps - self._start_step
        if self._start + steps * self.batch_size > self.corpus.mixture.length:
            last = int((self.corpus.mixture.length - self._start) // self.batch_size) + self._start_step
            raise UserError(
                f"data.mix runs out in step {last + 1}, before trainer.max_steps "
                f"{self.trainer.max_steps}: see when_exhausted"
            )
        return self.trainer.max_steps * accumulation if self.trainer.max_steps > 0 else None

    def val_dataloader(self) -> wds.WebLoader:
        """One pass over val/; every rank gets the same number of batches, padded with weight 0."""
        return self._eval_loader("val")

    def test_dataloader(self) -> wds.WebLoader:
        """One pass over test/. Raises UserError when there is none."""
        return self._eval_loader("test")

    def _eval_loader(self, name: str) -> wds.WebLoader:
        place, index, corpus = self._place(), self.index(name), Corpus(self.splits(name))
        micro, _ = self.micro_batch(place.world_size)
        stream = EvalStream(
            corpus,
            self.kind(index),
            micro,
            place.rank,
            place.world_size,
            self.max_skipped_share,
            self._kinds(name),
        )
        return self._loader(stream, min(self.num_workers, stream.batches), stream.batches)

    def _kinds(self, name: str) -> tuple[Kind, ...]:
        """A kind for each source that has this split, where no batch holds samples of two."""
        return tuple(self.kind(split.index) for split in self.splits(name)) if self.mix_by == "batch" else ()

    def _loader(self, stream: TrainStream | EvalStream, workers: int, batches: int | None) -> wds.WebLoader:
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        loader = build_loader(stream, workers, self.loading, on_gpu, batches)
        self._loaders.append(loader)
        return loader

    def _place(self) -> _Place:
        return (
            _Place(0, 1)
            if self.trainer is None
            else _Place(self.trainer.global_rank, self.trainer.world_size)
        )

    def teardown(self, stage: str) -> None:
        """End the loader workers."""
        while self._loaders:
            shut_down(self._loaders.pop())

    def on_exception(self, exception: BaseException) -> None:
        """End the loader workers also when training fails."""
        self.teardown("exception")
