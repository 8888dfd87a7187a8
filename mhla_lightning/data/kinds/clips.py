"""Video clips: KEY.clip.npy, uint8 (frames, height, width, 3), or KEY.mp4; captions KEY.txt."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mhla_lightning.data.encoders.videos import decode_mp4
from mhla_lightning.data.index import Clip, ShardIndex, TextEncoding
from mhla_lightning.data.kinds.base import Kind, array_of, member
from mhla_lightning.data.kinds.captions import caption_features, caption_of
from mhla_lightning.data.members import RawSample
from mhla_lightning.data.skips import BadSample
from mhla_lightning.errors import DataError
from mhla_lightning.randomness import generator

NPY, MP4 = "clip.npy", "mp4"


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
        assert self.text is not None
        clip, text = self._frames(sample), caption_features(sample, self.text)
        values = torch.from_numpy(clip[:, :, ::-1].copy() if mirrored else clip).permute(3, 0, 1, 2)
        return {"clip": (values.float() / 127.5 - 1).contiguous(), "text": text}
