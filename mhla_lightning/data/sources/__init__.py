"""Where images come from before they are packed: `mnist`, an image folder, or `torchvision:NAME[:ROOT]`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mhla_lightning.data.sources.base import Source, SourceSample, Split
from mhla_lightning.data.sources.folder import open_folder
from mhla_lightning.data.sources.mnist import open_mnist
from mhla_lightning.data.sources.vision import open_torchvision
from mhla_lightning.errors import UserError, unknown_name

__all__ = ["SOURCES", "Source", "SourceSample", "Split", "open_source"]

SOURCES: dict[str, Callable[[], Source]] = {"mnist": open_mnist}


def open_source(spec: str | Path) -> Source:
    """Open a source by name, by `torchvision:NAME[:ROOT]`, or by the path of an image folder.

    Raises UserError when `spec` is none of these, DataError when its files are not what they should be.
    """
    name, _, rest = str(spec).partition(":")
    if name == "torchvision" and rest:
        return open_torchvision(*rest.split(":", 1))
    if str(spec) in SOURCES:
        return SOURCES[str(spec)]()
    if Path(spec).is_dir():
        return open_folder(Path(spec))
    raise UserError(unknown_name("source (no such folder either)", str(spec), [*SOURCES, "FOLDER", "torchvision:NAME[:ROOT]"]))
