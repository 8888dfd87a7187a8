"""Captions of samples, the member KEY.txt, and their text features."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from torch import Tensor

from mhla_lightning.data.index import TextEncoding
from mhla_lightning.data.kinds.base import member
from mhla_lightning.data.members import RawSample
from mhla_lightning.data.skips import BadSample
from mhla_lightning.errors import DataError, UserError
from mhla_lightning.textfiles import NotText, decode

if TYPE_CHECKING:
    from mhla_lightning.data.encoders.text_encoders import TextEncoder

CAPTION = "txt"


def caption_of(sample: RawSample) -> str:
    """Return the member txt. Raises BadSample."""
    try:
        return decode(member(sample, CAPTION)[1])
    except NotText as error:
        raise BadSample(f"{CAPTION}: {error}") from error


def caption_features(sample: RawSample, text: TextEncoding) -> Tensor:
    """Return the features of a sample's caption, float32 (tokens, channels), zero-padded.

    Raises BadSample without a caption. Raises DataError for a caption that is too long; skipping it would
    go unnoticed.
    """
    from mhla_lightning.data.encoders.text_encoders import pad_rows

    caption = caption_of(sample)
    try:
        return pad_rows(_encoder(text).encode([caption]), text.tokens)[0]
    except UserError as error:
        raise DataError(sample["__url__"], f"sample {sample['__key__']}: {error.reason}") from error


@lru_cache(maxsize=8)
def _encoder(text: TextEncoding) -> TextEncoder:
    from mhla_lightning.data.encoders.text_encoders import load_text_encoder

    return load_text_encoder(text)
