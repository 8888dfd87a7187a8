"""Kinds of samples: images, captioned or not, tokens, latents, video clips."""

from __future__ import annotations

from mhla_lightning.data.index import ShardIndex
from mhla_lightning.data.kinds.base import Kind
from mhla_lightning.data.kinds.captioned_images import CaptionedImages
from mhla_lightning.data.kinds.clips import Clips
from mhla_lightning.data.kinds.images import Images
from mhla_lightning.data.kinds.latents import Latents
from mhla_lightning.data.kinds.tokens import Tokens
from mhla_lightning.errors import DataError

__all__ = ["CaptionedImages", "Clips", "Images", "Kind", "Latents", "Tokens", "kind_of"]


def kind_of(index: ShardIndex) -> Kind:
    """Return the kind that an index describes, without augmentation, for tools.

    Raises DataError for a kind that this version cannot read.
    """
    if index.kind == "images":
        return Images(len(index.classes))
    if index.kind == "tokens" and index.length:
        return Tokens(index.length)
    if index.kind in ("latents", "video_latents") and index.vae:
        text = (index.text.tokens, index.text.channels) if index.text else None
        return Latents(index.vae, len(index.classes), text, video=index.kind == "video_latents")
    if index.kind == "clips" and index.clip:
        return Clips(index.clip)
    raise DataError(
        None, f"{index.kind} shards cannot be read by this version, or their index lacks their description"
    )
