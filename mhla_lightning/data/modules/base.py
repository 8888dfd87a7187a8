"""The part that LightningDataModules of all kinds share: splits, order, position, loaders."""

from __future__ import annotations

import hashlib
import logging
import math
import os
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import lightning.pytorch as pl
import torch
import webdataset as wds
from lightning.pytorch import LightningDataModule

from mhla_lightning.arguments.plain import KeepsArguments
from mhla_lightning.arguments.saved import refuse_hparams
from mhla_lightning.data.ahead import ON_HOST, Draw, WorksAhead
from mhla_lightning.data.batching import RankPart, split_batch
from mhla_lightning.data.check import check_split
from mhla_lightning.data.corpus import Corpus, DataSource, TrainCorpus
from mhla_lightning.data.index import FORMAT, INDEX_NAME, SPLITS, ShardIndex, read_index
from mhla_lightning.data.kinds import Kind
from mhla_lightning.data.loader import Loading, build_loader, shut_down
from mhla_lightning.data.modules.advice import advice
from mhla_lightning.data.modules.epochs import EpochLoader, restate_progress
from mhla_lightning.data.modules.options import OrderConfig, ReadingConfig
from mhla_lightning.data.modules.plain_loader import PlainLoader, rank_of_process
from mhla_lightning.data.modules.position import check_position
from mhla_lightning.data.modules.restoring import load_data
from mhla_lightning.data.modules.trainer_limits import check_accumulation, check_callbacks, check_trainer
from mhla_lightning.data.split import Split
from mhla_lightning.data.stores import Remote, Store, open_store, with_cache
from mhla_lightning.data.stream import EvalPasses, EvalStream, TrainStream
from mhla_lightning.errors import DataError, UserError, inside

log = logging.getLogger(__name__)


class _Rank(NamedTuple):
    rank: int
    world_size: int


class ShardDataModule(KeepsArguments, LightningDataModule):
    """Batches from shards, in an order that is a function of (seed, position) alone.

    A stopped run continues with the next sample on any number of ranks and workers: its whole state is
    `state_dict`, the same on every rank. Lightning keeps the loader state of rank 0 only, and webdataset's
    pipelines have none.

    Args:
        path: folder or address (http, https, s3, gs) that holds train/, val/ and perhaps test/; None when
            `mix` is given.
        mix: several data sets instead of `path`.
        batch_size: samples of one optimizer step, over all ranks.
        micro_batch_size: samples that a rank takes at once; must divide its part of `batch_size`. None is
            the whole part.
        epochs: passes over the training data, the length of a recipe. A plain Trainer has its `max_epochs`
            for that; another number here is refused.
        order: seed and mixing of the training samples.
        reading: workers, checks and remote access.

    Attributes:
        consumed: training samples already consumed.
        endless: train in one endless epoch of the trainer's, which `lightning run` does. Otherwise an epoch
            has `samples // batch_size` steps, and a sample left over is in the next epoch.
    """

    def __init__(
        self,
        path: str | None,
        mix: Sequence[DataSource] | None,
        batch_size: int,
        micro_batch_size: int | None,
        epochs: float | None,
        order: OrderConfig,
        reading: ReadingConfig,
    ) -> None:
        """Store and validate the arguments. Raises UserError."""
        super().__init__()
        if (path is None) == (not mix):
            found = "neither is set" if path is None else "both are set"
            raise UserError("path", f"{found}; give either a `data.path` or a `data.mix`")
        self.sources = tuple(mix or ()) or (DataSource(os.path.expanduser(str(path))),)
        self.batch_size, self.micro_batch_size, self.epochs = batch_size, micro_batch_size, epochs
        self.order, self.reading = order, reading
        self._start = 0  # training samples consumed when the training loader was made
        self._start_step = 0  # optimizer steps done when the training loader was made
        self._restored: Mapping[str, Any] | None = None  # a state that no loader has taken up yet
        self._splits_read: dict[tuple[str, str], Split | None] = {}
        self._corpus: TrainCorpus | None = None
        self._loaders: list[wds.WebLoader] = []
        self._epochs: EpochLoader | None = None
        self._plain: PlainLoader | None = None
        self.endless = False
        self._validate()

    def _validate(self) -> None:
        if self.batch_size < 1:
            raise UserError("batch_size", f"{self.batch_size} is too small; it must be at least 1")
        if self.epochs is not None and not self.epochs > 0:
            raise UserError("epochs", f"{self.epochs} is too small; it must be a number above 0")
        if self.order.buckets is not None and not self.takes_buckets:
            raise UserError(
                "order.buckets",
                f"{type(self).__name__} resizes nothing; only images have buckets, and sources of several "
                "shapes are mixed by `order.mix_by` batch",
            )
        labels = [source.label for source in self.sources]
        for source in self.sources:
            if not (math.isfinite(source.weight) and source.weight > 0):
                raise UserError(
                    "mix", f"the weight of {source.label} is {source.weight}; it must be a number above 0"
                )
            if labels.count(source.label) > 1:
                raise UserError("mix", f"two sources have the name {source.label}; each needs its own name")

    takes_buckets: ClassVar[bool] = False  # whether samples can be brought to several sizes
    source: str | None = None  # the raw data that prepare_data packs into shards

    @property
    def loading(self) -> Loading:
        """How batches travel from the workers."""
        return self.reading.loading or Loading()

    @property
    def remote(self) -> Remote:
        """How files on other machines are fetched."""
        return self.reading.remote or Remote()

    def is_ready(self) -> bool:
        """Return whether shards to train on exist."""
        return all(self._store(source, "train").size(INDEX_NAME) is not None for source in self.sources)

    def _take_source(self, source: str | None, path: str | None) -> None:
        if source is not None and (path is None or "://" in path):
            found = "no `data.path` is given" if path is None else f"`data.path` is {path}"
            raise UserError("source", f"it is packed into a folder of this machine, and {found}")
        self.source = source

    def prepare_data(self) -> None:
        """Pack `source` into `path` when there are no shards yet.

        The seed of packing is always the same, so the hash of the data does not depend on the run's seed.
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
        raise UserError("source", f"{type(self).__name__} cannot pack raw data; it reads shards only")

    @abstractmethod
    def kind(self, index: ShardIndex) -> Kind:
        """Return the kind that turns samples of a split into tensors."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Return the facts of the data that a task needs before training."""

    @property
    def path(self) -> str:
        """The path, or those of the mixture."""
        return ", ".join(source.path for source in self.sources)

    def split(self, name: str, source: DataSource) -> Split | None:
        """Return a split of a source, opened once; None when the source has no split of this name.

        Raises DataError when it cannot be read.
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

    def _store(self, source: DataSource, split: str) -> Store:
        try:
            return open_store(f"{source.path.rstrip('/')}/{split}", self.remote)
        except UserError as error:
            if error.key is None:  # a missing package
                raise
            raise UserError("mix" if len(self.sources) > 1 else "path", str(error)) from error

    def splits(self, name: str) -> list[Split]:
        """Return the splits of this name of all sources that have one."""
        found = (self.split(name, source) for source in self.sources)
        return [split for split in found if split is not None]

    def index(self, split: str = "train") -> ShardIndex:
        """Return the index of a split, from the first source that has it.

        Raises DataError when no source has it.
        """
        splits = self.splits(split)
        if not splits:
            found = [name for name in SPLITS if self.splits(name)]
            raise DataError(self.path, f"there is no {split} split; splits: {', '.join(found)}")
        return splits[0].index

    @property
    def corpus(self) -> TrainCorpus:
        """The training data in its order."""
        if self._corpus is None:
            group = self.batch_size if self.order.mix_by == "batch" else 1
            self._corpus = self._train_corpus(self.splits("train"), self.sources, group)
        return self._corpus

    def _train_corpus(
        self, splits: Sequence[Split], sources: Sequence[DataSource], group: int
    ) -> TrainCorpus:
        return TrainCorpus(splits, sources, self.seed, self.order.lanes, self.order.window, group)

    @property
    def samples(self) -> int:
        """Training samples."""
        return sum(split.samples for split in self.splits("train"))

    @property
    def data_hash(self) -> str:
        """Identity of the training data (64 hex digits)."""
        return self.corpus.hash

    @property
    def val_hash(self) -> str | None:
        """Identity of the validation data; None where there is none."""
        hashes = [split.index.hash for split in self.splits("val")]
        return hashlib.sha256("\n".join(hashes).encode()).hexdigest() if hashes else None

    @property
    def seed(self) -> int:
        """The seed of order and augmentation."""
        seed = self.order.seed
        return seed if seed is not None else int(os.environ.get("PL_GLOBAL_SEED", "0"))

    def micro_batch(self, world_size: int) -> tuple[int, int]:
        """Return the samples that a rank takes at once and the accumulation steps.

        Raises UserError when the batch does not divide.
        """
        return split_batch(self.batch_size, world_size, self.micro_batch_size)

    def check(self, world_size: int) -> None:
        """Check the data and the batch before training on `world_size` ranks.

        Raises UserError for an argument that does not fit, DataError for the data.
        """
        self.micro_batch(world_size)
        for name in SPLITS:
            for split in self.splits(name):
                with inside("reading"):
                    check_split(split, self.reading.verify)
                self.kind(split.index).check(split.index, split.store.address(INDEX_NAME))
        if not self.splits("val"):
            raise DataError(
                self.path, "there is no val split: pack the data with one, or put one beside train"
            )

    @property
    def consumed(self) -> int:
        """Training samples already consumed."""
        if self._restored is not None:
            return int(self._restored["consumed"])
        if self._plain is not None:
            return self._plain.consumed
        steps = 0 if self.trainer is None else max(0, self.trainer.global_step - self._start_step)
        return self._start + steps * self.batch_size

    def consumed_by_source(self) -> dict[str, int]:
        """Return the training samples already consumed, by the source's name."""
        counts = self.corpus.mixture.counts(self.consumed)
        return {source.label: count for source, count in zip(self.corpus.sources, counts, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the sequence of samples and the arguments that define the sequence.

        It is the same on every rank, and part of every checkpoint.
        """
        consumed = self.consumed
        order = {
            "seed": self.seed,
            "lanes": self.order.lanes,
            "window": self.order.window,
            "data_hash": self.data_hash,
        }
        if self.order.mix_by == "batch":  # the sequence then depends on the size of the batch
            order |= {"mix_by": "batch", "batch_size": self.batch_size}
        return {"format": FORMAT, "epoch": consumed // self.samples, "consumed": consumed, **order}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a position.

        `train_dataloader` checks that it fits this data: a checkpoint may be validated on any data.
        """
        self._restored = dict(state_dict)

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: Any = None,
        weights_only: bool | None = None,
        **arguments: Any,
    ) -> Self:
        """Return a checkpoint's data module at its position; `ShardDataModule` finds the class.

        Args:
            checkpoint_path: a file of Lightning's, or a checkpoint folder of ours.
            map_location: has no effect.
            hparams_file: refused; the arguments are in the checkpoint.
            weights_only: False unpickles any object, which runs code of the file; None does not.
            arguments: replace those of the checkpoint.

        Raises:
            UserError: no such checkpoint, of another class, or without arguments.
        """
        refuse_hparams(hparams_file)
        return load_data(cls, checkpoint_path, weights_only is False, arguments)

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Refuse a position in another sequence. Raises UserError."""
        check_position(self.state_dict(), state)

    def setup(self, stage: str) -> None:
        """Refuse callbacks that would change the batch. Raises UserError.

        A new run of another trainer begins at the first sample.
        """
        if self.trainer is not None and stage == "fit":
            check_callbacks(self.trainer)
            if self.trainer.global_step == 0 and self._restored is None:
                self._start, self._start_step, self._plain = 0, 0, None

    def train_dataloader(self) -> wds.WebLoader | EpochLoader | PlainLoader:
        """Return the sequence of training batches from the current position on.

        Under a trainer it comes in epochs of one length; without one it has no end. `lightning run` has one
        epoch, of as many batches as its steps need.

        Raises UserError for arguments of the trainer that would change which samples come.
        """
        place = self._rank()
        with inside("data"):
            micro, accumulation = self.micro_batch(place.world_size)
            if self._restored is not None:
                self.check_state(self._restored)
        resumed = self._restored is not None
        if self.trainer is None:
            self._start, self._restored = self.consumed if resumed else self._start, None
            self._plain = PlainLoader(self._building(micro), None, self._start, self.batch_size, accumulation)
            return self._plain
        self._start, self._start_step, self._plain = self.consumed, self.trainer.global_step, None
        self._restored = None
        if place.rank == 0:
            val_samples = sum(split.samples for split in self.splits("val"))
            about_sizes = advice(self.samples, self.batch_size, val_samples)
            for sentence in chain(about_sizes, self.further_advice()):
                log.warning(sentence)
        check_accumulation(self.trainer, accumulation)
        if self.endless:
            if resumed:
                batches = self.trainer.global_step * accumulation
                restate_progress(self.trainer, lambda _: batches)
            self._check_mixture(self.trainer.max_steps - self._start_step)
            steps = self.trainer.max_steps
            return self._train_loader(micro, steps * accumulation if steps > 0 else None, self._start)
        return self._epoch_loader(self.trainer, micro, accumulation)

    def further_advice(self) -> Iterable[str]:
        """Return sentences about this kind of data that a user should know before training."""
        return ()

    def steps_of_epoch(self) -> int:
        """Return the optimizer steps of an epoch of the trainer, its `limit_train_batches` included."""
        steps = max(1, self.samples // self.batch_size)
        if self.trainer is None:
            return steps
        limit, accumulation = self.trainer.limit_train_batches, self.trainer.accumulate_grad_batches
        if isinstance(limit, float):
            return int(steps * accumulation * limit) // accumulation
        return steps if limit is None else min(steps, limit // accumulation)

    def _epoch_loader(self, trainer: pl.Trainer, micro: int, accumulation: int) -> EpochLoader:
        steps = max(1, self.samples // self.batch_size)
        check_trainer(trainer, steps * accumulation, accumulation, self.epochs)
        lengths = [trainer.max_steps - self._start_step] if trainer.max_steps > 0 else []
        if trainer.max_epochs is not None and trainer.max_epochs > 0:
            lengths.append((trainer.max_epochs - trainer.current_epoch) * steps)
        self._check_mixture(min(lengths, default=0))

        def restated(before: int) -> None:
            restate_progress(trainer, lambda batches: batches // before * accumulation)

        if trainer.fit_loop.epoch_loop.batch_progress.current.ready > steps * accumulation:
            # The checkpoint is of `lightning run`, whose one epoch has all batches.
            batches = trainer.global_step % steps * accumulation
            restate_progress(trainer, lambda _: batches)
        build, batches = self._building(micro), steps * accumulation
        self._epochs = EpochLoader(
            batches, accumulation, self.batch_size, lambda: self.consumed, build, restated
        )
        return self._epochs

    def _building(self, micro: int) -> Callable[[int], wds.WebLoader]:
        """Return what builds the endless loader from a position on, and ends the one before."""
        running: list[wds.WebLoader] = []

        def build(first: int) -> wds.WebLoader:
            for loader in running:
                self._end(loader)
            running[:] = [self._train_loader(micro, None, first)]
            return running[0]

        return build

    def _train_loader(self, micro: int, batches: int | None, first: int) -> wds.WebLoader:
        """Return a loader of the sequence from a position on.

        Args:
            micro: samples that a rank takes at once.
            batches: length; None has no end.
            first: the position.
        """
        place = self._rank()
        stream = TrainStream(
            self.corpus,
            self.kind(self.index()),
            RankPart(place.rank, place.world_size, self.batch_size, micro, first),
            self.reading.max_skipped_share,
            self._kinds("train"),
            self._draw(training=True),
        )
        return self._loader(stream, self.reading.num_workers, batches)

    def _draw(self, training: bool) -> Draw | None:
        module = None if self.trainer is None else self.trainer.lightning_module
        return module.draws_ahead(training) if isinstance(module, WorksAhead) else None

    def _check_mixture(self, steps: int) -> None:
        """Refuse a mixture that ends before so many steps from the current position on."""
        end = self.corpus.mixture.length
        if self._start + steps * self.batch_size > end:
            last = int((end - self._start) // self.batch_size) + self._start_step
            raise UserError(
                "data.mix",
                f"the mixture ends in step {last + 1}, before step {self._start_step + steps}: "
                "see when_exhausted",
            )

    def val_dataloader(self) -> wds.WebLoader | PlainLoader:
        """Return one pass over val/, with the same number of batches on every rank.

        Missing samples are padding of weight 0.
        """
        return self._eval_loader("val")

    def test_dataloader(self) -> wds.WebLoader | PlainLoader:
        """Return one pass over test/. Raises DataError when there is none."""
        return self._eval_loader("test")

    def predict_dataloader(self) -> wds.WebLoader | PlainLoader:
        """Return one pass over test/, or over val/ where there is no test/, for `Trainer.predict`."""
        return self._eval_loader("test" if self.splits("test") else "val")

    def _eval_loader(self, name: str) -> wds.WebLoader | PlainLoader:
        stream = self._eval_stream(name)
        loader = self._loader(stream, min(self.reading.num_workers, stream.batches), stream.batches)
        return loader if self.trainer is not None else PlainLoader(lambda _: loader, stream.batches)

    def _eval_stream(self, name: str) -> EvalStream | EvalPasses:
        place = self._rank()
        with inside("data"):
            micro, _ = self.micro_batch(place.world_size)
        return EvalStream(
            self._eval_corpus(name),
            self.kind(self.index(name)),
            micro,
            place.rank,
            place.world_size,
            self.reading.max_skipped_share,
            self._kinds(name),
            self._draw(training=False),
        )

    def _eval_corpus(self, name: str) -> Corpus:
        return Corpus(self.splits(name))

    def _kinds(self, name: str) -> tuple[Kind, ...]:
        """Return a kind for each source that has this split, where each batch is of one source."""
        if self.order.mix_by != "batch":
            return ()
        return tuple(self.kind(split.index) for split in self.splits(name))

    def _loader(
        self, stream: TrainStream | EvalStream | EvalPasses, workers: int, batches: int | None
    ) -> wds.WebLoader:
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        loader = build_loader(stream, workers, self.loading, on_gpu, batches)
        self._loaders.append(loader)
        return loader

    def _end(self, loader: wds.WebLoader) -> None:
        if loader in self._loaders:
            self._loaders.remove(loader)
        shut_down(loader)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move a batch without waiting, and keep on the host what only the host reads."""
        kept = {name: batch[name] for name in ON_HOST if name in batch}
        module = None if self.trainer is None else self.trainer.lightning_module
        added: dict[str, Any] = module.kept_on_host(batch) if isinstance(module, WorksAhead) else {}
        moved = {name: value for name, value in batch.items() if name not in kept}
        return {**super().transfer_batch_to_device(moved, device, dataloader_idx), **kept, **added}

    def _rank(self) -> _Rank:
        trainer = self.trainer
        return (
            _Rank(*rank_of_process()) if trainer is None else _Rank(trainer.global_rank, trainer.world_size)
        )

    def teardown(self, stage: str) -> None:
        """End the loader workers."""
        if self._epochs is not None:
            self._epochs.close()
        while self._loaders:
            shut_down(self._loaders.pop())

    def on_exception(self, exception: BaseException) -> None:
        """End the loader workers also when training fails."""
        self.teardown("exception")
