"""The LightningDataModule of labelled images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mhla_lightning.data.ahead import EvaluatesSizes
from mhla_lightning.data.buckets import PartOfSplit, image_sizes, keep_image_sizes, nearest_by_aspect
from mhla_lightning.data.corpus import Corpus, DataSource, TrainCorpus
from mhla_lightning.data.index import INDEX_NAME, SPLITS, ShardIndex
from mhla_lightning.data.kinds import Images, Kind
from mhla_lightning.data.modules.advice import Pixels, StartsFromWeights, advice_on_pixels, advice_on_start
from mhla_lightning.data.modules.base import ShardDataModule
from mhla_lightning.data.modules.options import ORDER, BucketConfig, OrderConfig, ReadingConfig
from mhla_lightning.data.skips import BadSample
from mhla_lightning.data.split import Split
from mhla_lightning.data.stream import EvalPasses, EvalStream
from mhla_lightning.data.transforms import Augmentation, image_hw
from mhla_lightning.errors import DataError, UserError

READING = ReadingConfig(num_workers=4)
_MEASURED = 32  # images whose pixels are compared with the normalisation
_THUMBNAIL = (64, 64)  # pixels; statistics of larger images are the same


class _Part(NamedTuple):
    """The images of a source that belong to a bucket; the source has its share as weight."""

    split: Split
    source: DataSource
    size: tuple[int, int]


class ImageDataModule(ShardDataModule):
    """Labelled images from shards.

    Args:
        path, mix, batch_size, micro_batch_size, epochs, order, reading: see :class:`ShardDataModule`.
        image_size: height and width in pixels, one number or a pair. `order.buckets` trains at other sizes,
            for which ratios of the augmentation are relative to the bucket's own ratio.
        augmentation: preprocessing of training and validation; None is the ImageNet recipe of DeiT.
        source: raw data that prepare_data packs into `path` when `path` holds no shards yet, e.g. mnist,
            fashion_mnist, a folder, torchvision:CIFAR10.
    """

    takes_buckets = True

    def __init__(
        self,
        path: str | None = None,
        batch_size: int = 256,
        micro_batch_size: int | None = None,
        epochs: float | None = None,
        image_size: int | tuple[int, int] = 224,
        augmentation: Augmentation | None = None,
        source: str | None = None,
        mix: list[DataSource] | None = None,
        order: OrderConfig = ORDER,
        reading: ReadingConfig = READING,
    ) -> None:
        """Store and validate the arguments. Raises UserError."""
        super().__init__(path, mix, batch_size, micro_batch_size, epochs, order, reading)
        self._take_source(source, path)
        self.image_size, self.augmentation = image_hw(image_size), augmentation or Augmentation()
        Images(1, self.image_size, self.augmentation)  # refuses an unknown policy before training
        self.buckets = order.buckets
        self._parts_made: dict[str, list[_Part]] = {}
        if self._by_aspect and any("://" in source.path for source in self.sources):
            raise UserError(
                "order.buckets.assign",
                "aspect reads the header of every image, so the shards must be on this machine",
            )

    @property
    def _by_aspect(self) -> bool:
        return self.buckets is not None and self.buckets.assign == "aspect"

    def prepare_data(self) -> None:
        """Pack `source`, and measure the images where buckets need their sizes."""
        super().prepare_data()
        if self._by_aspect and self.is_ready():
            for name in SPLITS:
                for source in self.sources:
                    split = self.split(name, source)
                    if split is not None:
                        keep_image_sizes(split, Path(source.path, name))

    def _parts(self, name: str) -> list[_Part]:
        """Return what belongs to every bucket of every source."""
        assert self.buckets is not None
        if name not in self._parts_made:
            found: list[_Part] = []
            for source in self.sources:
                split = self.split(name, source)
                if split is not None:
                    found += self._parts_of(split, source, self.buckets)
            self._parts_made[name] = found
        return self._parts_made[name]

    def _parts_of(self, split: Split, source: DataSource, buckets: BucketConfig) -> list[_Part]:
        alone, sizes, parts = len(self.sources) == 1, buckets.pairs, list[_Part]()
        owner = nearest_by_aspect(image_sizes(split), sizes) if self._by_aspect else None
        for number, size in enumerate(sizes):
            label = "x".join(map(str, size)) if alone else f"{source.label}/{'x'.join(map(str, size))}"
            chosen = None if owner is None else np.flatnonzero(owner == number)
            share = 1 / len(sizes) if chosen is None else len(chosen) / split.samples
            if share:
                whole = split if chosen is None else PartOfSplit(split, chosen)
                named = replace(source, name=label, weight=source.weight * share)
                parts.append(_Part(whole, named, size))
        return parts

    @property
    def corpus(self) -> TrainCorpus:
        """The training data in its order; with buckets, every bucket is a source of its own."""
        if self._corpus is None and self.buckets is not None:
            parts = self._parts("train")
            try:
                self._corpus = self._train_corpus(
                    [part.split for part in parts], [part.source for part in parts], self.batch_size
                )
            except UserError as error:
                counts = ", ".join(f"{part.source.label}: {part.split.samples}" for part in parts)
                raise UserError(
                    "order.buckets.sizes",
                    f"{error.reason}; images by bucket: {counts}; leave out those of too few",
                ) from error
        return super().corpus

    def _kinds(self, name: str) -> tuple[Kind, ...]:
        if self.buckets is None or not (name == "train" or self._by_aspect):
            return super()._kinds(name)
        plain = self.kind(self.index())
        kinds = {
            size: replace(plain, size=size, augmentation=self._stretched(size)) for size in self.buckets.pairs
        }
        return tuple(kinds[part.size] for part in self._parts(name))

    def _stretched(self, size: tuple[int, int]) -> Augmentation:
        """Return the augmentation whose crops have about the ratio of sides of a size."""
        low, high = self.augmentation.ratio
        return replace(self.augmentation, ratio=(low * size[1] / size[0], high * size[1] / size[0]))

    def _eval_corpus(self, name: str) -> Corpus:
        return (
            Corpus([part.split for part in self._parts(name)])
            if self._by_aspect
            else super()._eval_corpus(name)
        )

    def _eval_stream(self, name: str) -> EvalStream | EvalPasses:
        """Return the pass at image_size, and one at every further size of the model."""
        first = super()._eval_stream(name)
        module = None if self.trainer is None or self.trainer.predicting else self.trainer.lightning_module
        sizes = module.eval_sizes if isinstance(module, EvaluatesSizes) else ()
        if not sizes or not isinstance(first, EvalStream):
            return first
        plain, corpus = self.kind(self.index(name)), super()._eval_corpus(name)
        kinds = [replace(plain, size=image_hw(size)) for size in sizes]
        more = [replace(first, corpus=corpus, kind=kind, kinds=()) for kind in kinds]
        passes = EvalPasses([first, *more])
        self._refuse_limit(passes.batches)
        return passes

    def _refuse_limit(self, batches: int) -> None:
        """Refuse a limit of the trainer that would leave out sizes.

        Lightning counts the batches of all passes together.

        Raises:
            UserError: a limit below `batches`; 0 evaluates nothing and passes.
        """
        assert self.trainer is not None
        stage = "test" if self.trainer.testing else "val"
        limit = getattr(self.trainer, f"limit_{stage}_batches")
        kept = int(limit * batches) if isinstance(limit, float) else limit
        if 0 < kept < batches:
            raise UserError(
                "model.eval_sizes",
                f"`trainer.limit_{stage}_batches` {limit} would leave out sizes: the {batches:,} batches of "
                "all sizes follow one another; leave one of the two out",
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the position, and the buckets that the sequence depends on."""
        if self.buckets is None:
            return super().state_dict()
        sizes = [list(size) for size in self.buckets.pairs]
        buckets = {"sizes": sizes, "assign": self.buckets.assign, "batch_size": self.batch_size}
        return {**super().state_dict(), "buckets": buckets}

    def _pack(self, source: str, folder: Path) -> None:
        from mhla_lightning.data.prepare.pack import pack

        pack(source, folder)

    def kind(self, index: ShardIndex) -> Images:
        """Return images with this module's augmentation."""
        return Images(len(index.classes), self.image_size, self.augmentation, self.seed)

    def check(self, world_size: int) -> None:
        """Check also that all splits have the same classes."""
        super().check(world_size)
        for name in SPLITS:
            for split in self.splits(name):
                if split.index.classes != self.index().classes:
                    raise DataError(
                        split.store.address(INDEX_NAME),
                        f"its classes differ from those of {self.sources[0].path}; data sets that are used "
                        "together need one list of classes",
                    )

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.index().classes)

    def sample_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width of the tensor that :meth:`to_images` makes such an image of."""
        return height, width

    def to_images(self, x: Tensor) -> Tensor:
        """Return normalised pixels (batch, 3, H, W) as uint8 (batch, H, W, 3)."""
        mean, std = (
            torch.tensor(values, device=x.device)[:, None, None]
            for values in (self.augmentation.mean, self.augmentation.std)
        )
        return ((x.float() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)

    def further_advice(self) -> Iterator[str]:
        """Yield a sentence where pixels are normalised for other images or other weights."""
        used = Pixels(tuple(self.augmentation.mean), tuple(self.augmentation.std))
        module = None if self.trainer is None else self.trainer.lightning_module
        start = module.start_normalisation() if isinstance(module, StartsFromWeights) else None
        if start is not None:
            yield from advice_on_start(Pixels(*start), used)
        elif all("://" not in source.path for source in self.sources):  # else whole shards would be fetched
            measured = self._measured_pixels()
            yield from () if measured is None else advice_on_pixels(measured, used)

    def _measured_pixels(self) -> Pixels | None:
        """Return the statistics of some training images, evenly over the split; None without any."""
        split = self.splits("train")[0]
        kind, found = self.kind(split.index), list[np.ndarray]()
        for number in range(min(_MEASURED, split.samples)):
            raw = kind.read(split, [number * split.samples // min(_MEASURED, split.samples)])[0]
            with suppress(BadSample):
                image, _ = kind.inspect(raw)
                image.thumbnail(_THUMBNAIL)
                found.append(np.asarray(image, dtype=np.float64).reshape(-1, 3) / 255)
        if not found:
            return None
        mean = np.mean([pixels.mean(0) for pixels in found], axis=0)
        square = np.mean([(pixels**2).mean(0) for pixels in found], axis=0)
        std = np.sqrt(np.maximum(square - mean**2, 0))
        return Pixels(tuple(map(float, mean)), tuple(map(float, std)))

    def facts(self) -> dict[str, Any]:
        """Return the kind, the number of classes, and (height, width) of the images."""
        facts = {"kind": "images", "classes": self.num_classes, "image_size": self.image_size}
        return facts if self.buckets is None else {**facts, "sizes": self.shares()}

    def shares(self) -> dict[tuple[int, int], float]:
        """Return the share of the training samples of every size that has some."""
        parts = self._parts("train")
        total, shares = sum(part.source.weight for part in parts), dict[tuple[int, int], float]()
        for part in parts:
            shares[part.size] = shares.get(part.size, 0.0) + part.source.weight / total
        return shares
