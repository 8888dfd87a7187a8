"""A folder of latents, one npy file each, one subfolder a class."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from mhla_lightning.data.index import VAE, ShardIndex
from mhla_lightning.data.npy import load_npy
from mhla_lightning.data.prepare.samples import Sample, latent_sample
from mhla_lightning.data.prepare.sources.base import SampleSource
from mhla_lightning.data.prepare.sources.listing import LabelledFiles, list_classes
from mhla_lightning.errors import DataError

DIMENSIONS = {"latents": 3, "video_latents": 4}


def open_latents(folder: Path, kind: str, vae: VAE) -> SampleSource:
    """Open FOLDER/CLASS/*.npy: (C, h, w) for latents, (C, t, h, w) for video_latents.

    Args:
        folder: of the classes.
        kind: latents or video_latents.
        vae: what made the latents; its shape is taken from the first file.

    Raises:
        DataError: a folder without this layout (see list_classes), or arrays of another number of
            dimensions.
    """
    listing = list_classes(folder, "latent.npy")
    first = listing.files["train"][0][0]
    shape = _read(first).shape
    if len(shape) != DIMENSIONS[kind]:
        raise DataError(
            str(first),
            f"is {shape}; {kind} have {'(C, h, w)' if kind == 'latents' else '(C, t, h, w)'}: "
            "choose the `kind` that fits",
        )
    header = ShardIndex(kind, (), listing.classes, vae=replace(vae, shape=shape))
    return SampleSource(
        header,
        {split: LabelledFiles(header, files, _sample) for split, files in listing.files.items()},
        listing.fingerprint,
    )


def _sample(header: ShardIndex, path: Path, label: int) -> Sample:
    sample = latent_sample(header, str(path), _read(path), label=label)
    return replace(sample, name=f"{path.parent.name}-{path.stem}")


def _read(path: Path) -> np.ndarray:
    try:
        return load_npy(path.read_bytes(), str(path))
    except OSError as error:
        raise DataError(str(path), f"cannot be read ({error.strerror})") from error
