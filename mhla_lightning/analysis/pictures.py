"""A held-out sample beside its attention maps: pixels on the token grid, or pieces of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional as F

from mhla_lightning.errors import UserError
from mhla_lightning.inference.loading import kept_tokenizer
from mhla_lightning.runs.folder import RunFolder
from mhla_lightning.tasks import Task

_SAMPLES = ("latent", "clip", "image")
_SHOWN = {ord("\n"): "\u21b5", ord("\t"): "\u21e5", ord(" "): "\u2423"}  # a tick label shows no white space


def sample_pixels(task: Task, sample: Mapping[str, Any]) -> np.ndarray | None:
    """Return the pixels of a sample, (frames, height, width, 3) in [0, 1].

    An image has one frame. Of latents these are the first three channels, stretched to [0, 1]. Text has no
    pixels: None. An image that the model pads is padded.

    Args:
        task: with its backbone.
        sample: a batch of one sample.
    """
    value = next((sample[name] for name in _SAMPLES if name in sample), None)
    if not isinstance(value, Tensor):
        return None
    pixels = value[0].float().cpu()
    pixels = pixels[:, None] if pixels.dim() == 3 else pixels  # (channels, frames, height, width)
    low, high = pixels.min(), pixels.max()
    pixels = (pixels - low) / (high - low).clamp_min(1e-6)
    pixels = pixels[:3] if len(pixels) >= 3 else pixels[:1].expand(3, -1, -1, -1)
    if isinstance(task.backbone, VisionTransformer):
        spare = [
            full - side
            for full, side in zip(task.backbone.patch_embed.img_size, pixels.shape[-2:], strict=True)
        ]
        pixels = F.pad(
            pixels, (spare[1] // 2, spare[1] - spare[1] // 2, spare[0] // 2, spare[0] - spare[0] // 2)
        )
    return pixels.permute(1, 2, 3, 0).numpy()


def sample_text(run: RunFolder, sample: Mapping[str, Any], shown: Tensor) -> list[str] | None:
    """Return the text of each shown token; None for pixels.

    Where the run keeps no tokenizer, it is the token's id.

    Args:
        run: of the model.
        sample: a batch of one sample.
        shown: (tokens,) int64, their numbers in the row.
    """
    if "tokens" not in sample:
        return None
    ids = sample["tokens"][0].cpu()[shown].tolist()
    try:
        pieces: Sequence[bytes] = kept_tokenizer(run).pieces
    except UserError:
        return [str(number) for number in ids]
    return [_piece(pieces[number]) if number < len(pieces) else str(number) for number in ids]


def _piece(piece: bytes) -> str:
    """Return a token's bytes as text that a plot can show."""
    text = piece.decode("utf-8", errors="replace").translate(_SHOWN)
    return "".join(letter if letter.isprintable() else "\u00b7" for letter in text) or "\u00b7"


def on_grid(shares: Tensor, shown: Tensor, grid: Sequence[int]) -> np.ndarray:
    """Return shares (tokens,) of the shown tokens on their grid; nan at other tokens."""
    full = torch.full((int(np.prod(grid)),), torch.nan, dtype=torch.float64)
    full[shown] = shares.double()
    return full.view(*grid).numpy()
