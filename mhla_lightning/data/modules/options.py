"""Options of the data modules, grouped as the sections of a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from mhla_lightning.data.check import Verify
from mhla_lightning.data.loader import Loading
from mhla_lightning.data.order import LANES, WINDOW
from mhla_lightning.data.prepare.text.layout import Packing
from mhla_lightning.data.stores import Remote
from mhla_lightning.data.transforms import image_hw
from mhla_lightning.errors import UserError, unknown_name

MixBy = Literal["sample", "batch"]


Assign = Literal["all", "aspect"]


@dataclass(frozen=True)
class BucketConfig:
    """Sizes of training images; all images of an optimizer step have one of them.

    Args:
        sizes: in pixels, numbers or [height, width]; every one is a bucket.
        assign: `all` brings every image in every size, and the sizes equally often. `aspect` brings an image
            in the size of the nearest ratio of sides only, and the sizes as often as they have images.
    """

    sizes: Sequence[int | Sequence[int]]
    assign: Assign = "all"

    def __post_init__(self) -> None:
        """Raise UserError for no size, a size twice, or another way to assign."""
        if self.assign not in get_args(Assign):
            raise UserError("order.buckets.assign", unknown_name("value", self.assign, get_args(Assign)))
        if not self.sizes:
            raise UserError(
                "order.buckets.sizes",
                "the list is empty; give at least one size, or leave `order.buckets` out",
            )
        if len(set(self.pairs)) < len(self.sizes):
            raise UserError(
                "order.buckets.sizes", f"{list(self.sizes)} has a size twice; every size is one bucket"
            )

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of every size."""
        return tuple(image_hw(size, "order.buckets.sizes") for size in self.sizes)  # type: ignore[arg-type]


@dataclass(frozen=True)
class OrderConfig:
    """The order in which training reads its samples; part of every checkpoint.

    Args:
        seed: of the order and of the augmentation; None takes the run's seed (PL_GLOBAL_SEED), else 0.
        lanes: parts of the data set that are read side by side. With a multiple of the number of ranks,
            every rank reads its own shards.
        window: samples; the largest distance over which samples are mixed inside a lane.
        mix_by: with several sources, whether each `sample` or each `batch` of an optimizer step is drawn
            from one source. With `batch`, the sources may differ in the shape of their samples.
        buckets: sizes of training images, one for every optimizer step; None trains at `image_size`.
    """

    seed: int | None = None
    lanes: int = LANES
    window: int = WINDOW
    mix_by: MixBy = "sample"
    buckets: BucketConfig | None = None

    def __post_init__(self) -> None:
        """Raise UserError for a value outside its range."""
        _demand_least("order", {"lanes": (self.lanes, 1), "window": (self.window, 1)})
        if self.mix_by not in get_args(MixBy):
            raise UserError("order.mix_by", unknown_name("value", self.mix_by, get_args(MixBy)))
        if self.buckets is not None and self.mix_by == "batch":
            raise UserError(
                "order.mix_by", "with `order.buckets` every step has one source anyway; write sample"
            )


@dataclass(frozen=True)
class ReadingConfig:
    """How samples are read; no choice here changes what is trained on.

    Args:
        num_workers: loader processes of a rank; 0 loads in the training process.
        max_skipped_share: share of the samples, from 0 to 1, that a worker may skip because they cannot be
            decoded.
        verify: how files are compared with the index before training: auto, size, sha256 or none (see
            check.check_split).
        loading: how batches travel from the workers; None takes the defaults of Loading.
        remote: retries, time-outs and cache of shards on other machines; None takes the defaults of Remote.
    """

    num_workers: int = 2
    max_skipped_share: float = 0.01
    verify: Verify = "auto"
    loading: Loading | None = None
    remote: Remote | None = None

    def __post_init__(self) -> None:
        """Raise UserError for a value outside its range."""
        _demand_least("reading", {"num_workers": (self.num_workers, 0)})
        if not 0 <= self.max_skipped_share <= 1:
            raise UserError(
                "reading.max_skipped_share", f"{self.max_skipped_share} is no share; it must be from 0 to 1"
            )


@dataclass(frozen=True)
class TextConfig:
    """How text becomes rows of tokens; describes what is made of `source`.

    Args:
        tokenizer: bytes, a tokenizer.json, or a Hugging Face name. Existing shards must be made with it;
            None takes bytes for `source` and accepts any existing shards.
        length: tokens of a row; None is 2048, or 128 for mqar.
        val_length: tokens of a row of the val split; None is `length`.
        packing: best-fit cuts few documents; concatenate leaves no padding.
        val: documents (rows for mqar) held out for validation, as a number or a share; None is 0.01, or
            1000 rows for mqar.
    """

    tokenizer: str | None = None
    length: int | None = None
    val_length: int | None = None
    packing: Packing = "best-fit"
    val: int | float | None = None


@dataclass(frozen=True)
class ClipConfig:
    """How videos become clips; all but `flip` describes what is made of `source`.

    Args:
        frames: frames of a clip; None is 16.
        size: pixels, one number or (height, width); None is 64.
        rate: frames a second; None is 12.
        stride: frames from the begin of a clip to that of the next; clips overlap below `frames`. None is
            `frames`.
        shots: whether a cut in the film ends a clip.
        val: share of every video, its end, that is held out for validation.
        flip: probability of mirroring a training clip from left to right.
    """

    frames: int | None = None
    size: int | tuple[int, int] | None = None
    rate: float | None = None
    stride: float | None = None
    shots: bool = True
    val: float = 0.2
    flip: float = 0.0

    def __post_init__(self) -> None:
        """Raise UserError for a flip that is no probability."""
        if not 0 <= self.flip <= 1:
            raise UserError("clips.flip", f"{self.flip} is no probability; it must be from 0 to 1")


def _demand_least(section: str, values: dict[str, tuple[int, int]]) -> None:
    for name, (value, least) in values.items():
        if value < least:
            raise UserError(f"{section}.{name}", f"{value} is too small; it must be at least {least}")


# Defaults of the data modules.
ORDER, READING, TEXT, CLIPS = OrderConfig(), ReadingConfig(), TextConfig(), ClipConfig()
