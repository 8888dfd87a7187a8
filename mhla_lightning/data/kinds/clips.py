"""Video clips: KEY.clip.npy, uint8 (frames, height, width, 3), or KEY.mp4; captions KEY.txt."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mhla_lightning.data.encoders.videos import decode_mp4
from mhla_lightning.data.index import Clip, ShardIndex, TextEncoding
from mhla_lightning.data.kinds.base import Kind, array_of, member
from mhla_lightning.data.members import RawSample
from mhla_lightning.data.skips import BadSample
from mhla_lightning.errors import DataError, UserError
from mhla_lightning.randomness import generator
from mhla_lightning.textfiles import NotText, decode

if TYPE_CHECKING:
    from mhla_lightning.data.encoders.text_encoders import TextEncoder

NPY, MP4, CAPTION = "clip.npy", "mp4", "txt"


@dataclass
class Clips(Kind):
    """Video clips and features of their captions.

    Clips are float32 (3, frames, height, width) in [-1, 1]; features are float32 (tokens, channels),
    zero-padded.

    Args:
        clip: their size, from the index.
        text: encoder of the captions; None for tools, which take captions as text.
        flip: probability of mirroring a training clip from left to right.
        seed: of the flips.
    """

    clip: Clip
    text: TextEncoding | None = None
    flip: float = 0.0
    seed: int = 0

    def inspect(self, sample: RawSample) -> dict[str, np.ndarray | str]:
        """Return clip, uint8 (frames, height, width, 3), and caption."""
        return {"clip": self._frames(sample), "caption": caption_of(sample)}

    def train(self, sample: RawSample, epoch: int) -> dict[str, Tensor]:
        """Return the clip, mirrored or not by (seed, epoch, index)."""
        mirrored = generator(self.seed, "clip", epoch, sample["__index__"]).random() < self.flip
        return self._tensors(sample, mirrored)

    def evaluate(self, sample: RawSample) -> dict[str, Tensor]:
        """Return the clip as it is."""
        return self._tensors(sample, mirrored=False)

    def padding(self) -> dict[str, Tensor]:
        """Return a grey clip without text."""
        text = (self.text.tokens, self.text.channels) if self.text else (1, 1)
        return {
            "clip": torch.zeros(3, self.clip.frames, self.clip.height, self.clip.width),
            "text": torch.zeros(text),
        }

    def check(self, index: ShardIndex, address: str) -> None:
        """Refuse anything but clips."""
        if index.kind != "clips" or index.clip is None:
            raise DataError(address, f"it holds {index.kind}; clips are needed (mhla data clips)")

    def _frames(self, sample: RawSample) -> np.ndarray:
        """Return the frames, uint8 (frames, height, width, 3)."""
        extension, data = member(sample, NPY, MP4)
        if extension == MP4:
            try:
                return decode_mp4(data, self.clip, MP4)
            except DataError as error:
                raise BadSample(str(error)) from error
        clip = array_of(sample, NPY)
        wanted = (self.clip.frames, self.clip.height, self.clip.width, 3)
        if clip.shape != wanted or clip.dtype != np.uint8:
            raise BadSample(f"{NPY} is {clip.dtype} {clip.shape}; in the index it is uint8 {wanted}")
        return clip

    def _tensors(self, sample: RawSample, mirrored: bool) -> dict[str, Tensor]:
        clip, caption = self._frames(sample), caption_of(sample)
        values = torch.from_numpy(clip[:, :, ::-1].copy() if mirrored else clip).permute(3, 0, 1, 2)
        return {"clip": (values.float() / 127.5 - 1).contiguous(), "text": self._features(sample, caption)}

    def _features(self, sample: RawSample, caption: str) -> Tensor:
        """Return the features of a caption, (tokens, channels).

        Raises DataError for a caption that is too long; skipping it would go unnoticed.
        """
        from mhla_lightning.data.encoders.text_encoders import pad_rows

        assert self.text is not None
        try:
            return pad_rows(_encoder(self.text).encode([caption]), self.text.tokens)[0]
        except UserError as error:
            raise DataError(sample["__url__"], f"sample {sample['__key__']}: {error.reason}") from error


def caption_of(sample: RawSample) -> str:
    """Return the member txt. Raises BadSample."""
    try:
        return decode(member(sample, CAPTION)[1])
    except NotText as error:
        raise BadSample(f"{CAPTION}: {error}") from error


@lru_cache(maxsize=8)
def _encoder(text: TextEncoding) -> TextEncoder:
    from mhla_lightning.data.encoders.text_encoders import load_text_encoder

    return load_text_encoder(text)
