"""What can be packed: `mnist`, a folder of images or latents, `torchvision:NAME[:ROOT]`, or
`mqar[:PAIRS]`. Text is packed by tools/text.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mhla_lightning.data.index import VAE
from mhla_lightning.data.prepare.sources.base import Part, Source
from mhla_lightning.data.prepare.sources.folder import open_folder
from mhla_lightning.data.prepare.sources.latents import DIMENSIONS, open_latents
from mhla_lightning.data.prepare.sources.mnist import open_mnist
from mhla_lightning.data.prepare.sources.mqar import is_mqar, open_mqar
from mhla_lightning.data.prepare.sources.vision import open_torchvision
from mhla_lightning.errors import UserError, unknown_name

__all__ = ["PACKED_KINDS", "SOURCES", "Part", "Source", "open_source"]

SOURCES: dict[str, Callable[[], Source]] = {"mnist": open_mnist}
PACKED_KINDS = ("images", *DIMENSIONS)


def open_source(spec: str | Path, kind: str = "images", vae: VAE | None = None) -> Source:
    """Open a source by name, by `torchvision:NAME[:ROOT]`, by `mqar[:PAIRS]`, or by the path of a folder with
    one subfolder a class.

    kind: images, latents or video_latents; vae: what made the latents (its shape is taken from the files).
    Raises UserError when `spec` is none of these, DataError when its files are not what they should be.
    """
    if kind not in PACKED_KINDS:
        raise UserError(unknown_name("kind", kind, PACKED_KINDS))
    if (kind == "images") != (vae is None):
        raise UserError(
            f"--kind {kind} "
            f"{'takes no --vae' if vae else 'needs --vae-name, --vae-scale and --vae-shift: they are part of the data'}"
        )
    if vae is not None:
        if not Path(spec).is_dir():
            raise UserError(f"{spec} is no folder: {kind} are packed from FOLDER/CLASS/*.npy")
        return open_latents(Path(spec), kind, vae)
    name, _, rest = str(spec).partition(":")
    if name == "torchvision" and rest:
        return open_torchvision(*rest.split(":", 1))
    if is_mqar(str(spec)):
        return open_mqar(str(spec))
    if str(spec) in SOURCES:
        return SOURCES[str(spec)]()
    if Path(spec).is_dir():
        return open_folder(Path(spec))
    raise UserError(
        unknown_name(
            "source (no such folder either)",
            str(spec),
            [*SOURCES, "FOLDER", "torchvision:NAME[:ROOT]", "mqar[:PAIRS]"],
        )
    )
