"""The LightningDataModule of labelled images."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import webdataset as wds
from lightning.pytorch import LightningDataModule

from mhla_lightning.data.batching import eval_batches_per_rank, split_batch
from mhla_lightning.data.check import Verify, check_split
from mhla_lightning.data.index import INDEX_NAME, ShardIndex, read_index
from mhla_lightning.data.loader import LoaderOptions, StartMethod, build_loader, shut_down
from mhla_lightning.data.stream import EvalStream, TrainStream
from mhla_lightning.data.transforms import Augmentation, eval_transform, image_hw, train_transform
from mhla_lightning.errors import DataError, UserError


class _Place(NamedTuple):
    rank: int
    world_size: int


class ImageDataModule(LightningDataModule):
    """Labelled images from shards under `path` (train/, val/ and perhaps test/; see this folder's README).

    Args:
        path: folder of the splits.
        batch_size: samples of one optimizer step, over all ranks.
        micro_batch_size: samples a rank takes at once; must divide its part of batch_size. None: the whole part.
        epochs: passes over the training split; `lightning run` turns it into trainer.max_steps. Nothing here reads it.
        image_size: height and width in pixels, one number or a pair.
        num_workers: loader processes per rank; 0 loads in the training process.
        augmentation: None is the ImageNet recipe of DeiT.
        source: packed into `path` by prepare_data when `path` holds no shards yet, e.g. mnist, a folder, torchvision:CIFAR10.
        shuffle_buffer: undecoded samples that a worker mixes.
        max_skipped_share: share of samples that may be skipped because they cannot be decoded, per worker.
        verify: how `check` compares files with the index: auto, size, sha256 or none (see check.check_split).
        seed: of order and augmentation. None: the run's seed (PL_GLOBAL_SEED), else 0.
        prefetch_factor: batches that a worker keeps ready.
        start_method: how worker processes start: fork, forkserver or spawn. None: Python's default.

    Attributes:
        consumed: training samples already consumed; set before a resumed fit, which then starts with epoch consumed // samples.
    """

    def __init__(
        self,
        path: str,
        batch_size: int = 256,
        micro_batch_size: int | None = None,
        epochs: float | None = None,
        image_size: int | tuple[int, int] = 224,
        num_workers: int = 4,
        augmentation: Augmentation | None = None,
        source: str | None = None,
        shuffle_buffer: int = 2048,
        max_skipped_share: float = 0.01,
        verify: Verify = "auto",
        seed: int | None = None,
        prefetch_factor: int = 2,
        start_method: StartMethod | None = None,
    ) -> None:
        """Store and validate the arguments. Raises UserError."""
        super().__init__()
        self.path = Path(path).expanduser()
        self.batch_size, self.micro_batch_size, self.epochs = batch_size, micro_batch_size, epochs
        self.image_size = image_hw(image_size)
        self.num_workers, self.prefetch_factor, self.start_method = num_workers, prefetch_factor, start_method
        self.augmentation = augmentation or Augmentation()
        self.source, self.verify, self._seed = source, verify, seed
        self.shuffle_buffer, self.max_skipped_share = shuffle_buffer, max_skipped_share
        self.consumed = 0
        self._indices: dict[str, ShardIndex] = {}
        self._loaders: list[wds.WebLoader] = []
        self._train_transform = train_transform(self.image_size, self.augmentation)
        self._eval_transform = eval_transform(self.image_size, self.augmentation)
        self._validate()

    def _validate(self) -> None:
        least = {"batch_size": 1, "num_workers": 0, "shuffle_buffer": 1, "prefetch_factor": 1}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise UserError(f"data.{name} is {getattr(self, name)}; it must be at least {value}")
        if self.epochs is not None and not self.epochs > 0:
            raise UserError(f"data.epochs is {self.epochs}; it must be a number above 0")
        if not 0 <= self.max_skipped_share <= 1:
            raise UserError(f"data.max_skipped_share is {self.max_skipped_share}; it must be from 0 to 1")

    def prepare_data(self) -> None:
        """Pack `source` into `path` when there are no shards yet. Always with the same seed, so that the data's hash does not depend on the run's."""
        if self.source is None or self._is_packed():
            return
        from mhla_lightning.data.pack import pack

        try:
            pack(self.source, self.path)
        except UserError:
            if not self._is_packed():  # another process may have finished the same work first
                raise

    def _is_packed(self) -> bool:
        return (self.path / "train" / INDEX_NAME).is_file()

    def check(self, world_size: int) -> None:
        """Everything that can be known to be wrong before training on `world_size` ranks. Raises UserError or DataError, one sentence."""
        self.micro_batch(world_size)
        indices = {split: check_split(self.path / split, self.verify) for split in self._splits()}
        train = indices["train"]
        for split, index in indices.items():
            if index.kind != "images" or not index.classes:
                raise DataError(
                    f"{self.path / split / INDEX_NAME} holds {index.kind} with {len(index.classes)} classes; images with classes are needed"
                )
            if index.classes != train.classes:
                raise DataError(f"{self.path / split / INDEX_NAME} lists other classes than train: pack both splits in one go")
        self._check_shards(len(train.shards), world_size)

    def _splits(self) -> list[str]:
        return ["train", "val"] + (["test"] if (self.path / "test").is_dir() else [])

    def _check_shards(self, shards: int, world_size: int) -> None:
        workers = max(self.num_workers, 1)
        if shards >= world_size * workers:
            return
        fewer = f"use data.num_workers {shards // world_size} or less, or " if shards >= world_size else ""
        raise UserError(
            f"{self.path / 'train'} has {shards} shards, fewer than {world_size} ranks x {workers} data.num_workers = {world_size * workers}:"
            f" {fewer}pack again with --shards {world_size * workers} or more"
        )

    def index(self, split: str = "train") -> ShardIndex:
        """The index of a split, read once. Raises DataError when there is none."""
        if split not in self._indices:
            self._indices[split] = read_index(self.path / split)
        return self._indices[split]

    @property
    def samples(self) -> int:
        """Training samples."""
        return self.index().samples

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.index().classes)

    @property
    def data_hash(self) -> str:
        """Hash of the training split (64 hex digits)."""
        return self.index().hash

    @property
    def seed(self) -> int:
        """The seed of order and augmentation."""
        return self._seed if self._seed is not None else int(os.environ.get("PL_GLOBAL_SEED", "0"))

    def micro_batch(self, world_size: int) -> tuple[int, int]:
        """(samples a rank takes at once, accumulation steps). Raises UserError when the batch does not divide."""
        return split_batch(self.batch_size, world_size, self.micro_batch_size)

    def train_dataloader(self) -> wds.WebLoader:
        """Endless epochs, as long as trainer.max_steps needs (without a length when max_steps is -1)."""
        place = self._place()
        micro, accumulation = self.micro_batch(place.world_size)
        stream = TrainStream(
            self.path / "train",
            self.index(),
            self._train_transform,
            micro,
            seed=self.seed,
            rank=place.rank,
            world_size=place.world_size,
            first_epoch=self.consumed // self.samples,
            shuffle_buffer=self.shuffle_buffer,
            max_skipped_share=self.max_skipped_share,
        )
        return self._loader(stream, self.num_workers, self._train_batches(accumulation))

    def _train_batches(self, accumulation: int) -> int | None:
        if self.trainer is None:
            return None
        if self.trainer.accumulate_grad_batches != accumulation:
            raise UserError(
                f"trainer.accumulate_grad_batches is {self.trainer.accumulate_grad_batches}, but data.batch_size and data.micro_batch_size give"
                f" {accumulation}: leave it out, it follows from them"
            )
        return self.trainer.max_steps * accumulation if self.trainer.max_steps > 0 else None

    def val_dataloader(self) -> wds.WebLoader:
        """One pass over val/; every rank gets the same number of batches, padded with weight 0."""
        return self._eval_loader("val")

    def test_dataloader(self) -> wds.WebLoader:
        """One pass over test/. Raises UserError when there is none."""
        if not (self.path / "test").is_dir():
            raise UserError(f"{self.path} has no test split; splits: {', '.join(self._splits())}")
        return self._eval_loader("test")

    def _eval_loader(self, split: str) -> wds.WebLoader:
        place, index = self._place(), self.index(split)
        micro, _ = self.micro_batch(place.world_size)
        batches = eval_batches_per_rank(index.samples, micro, place.world_size)
        stream = EvalStream(
            self.path / split, index, self._eval_transform, micro, self.image_size, place.rank, place.world_size, self.max_skipped_share
        )
        return self._loader(stream, min(self.num_workers, batches), batches)

    def _loader(self, stream: TrainStream | EvalStream, workers: int, batches: int | None) -> wds.WebLoader:
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        loader = build_loader(stream, LoaderOptions(workers, self.prefetch_factor, on_gpu, self.start_method), batches)
        self._loaders.append(loader)
        return loader

    def _place(self) -> _Place:
        return _Place(0, 1) if self.trainer is None else _Place(self.trainer.global_rank, self.trainer.world_size)

    def teardown(self, stage: str) -> None:
        """End the loader workers."""
        while self._loaders:
            shut_down(self._loaders.pop())

    def on_exception(self, exception: BaseException) -> None:
        """End the loader workers also when training fails."""
        self.teardown("exception")
