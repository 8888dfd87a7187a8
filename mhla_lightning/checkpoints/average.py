"""The averaged weights of a checkpoint folder: one file, or one file per rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from mhla_lightning.finite import check_finite
from mhla_lightning.weights.rank_files import WEIGHT, RankFileReader, holds_rank_files
from mhla_lightning.weights.stored import open_safetensors

FOLDER = "ema"
WHOLE = "weights.safetensors"


def has_average(checkpoint: Path) -> bool:
    """Whether a checkpoint folder holds averaged weights."""
    return (checkpoint / FOLDER / WHOLE).is_file() or holds_rank_files(checkpoint / FOLDER)


def open_average(checkpoint: Path, model: Mapping[str, Tensor]) -> Callable[[str, int, int], Tensor] | None:
    """Return a reader of the average: (name, start, numel) -> flat tensor.

    None where the folder has no average, or the average of another model.

    Args:
        checkpoint: a checkpoint folder.
        model: the backbone's state, of which the floating tensors are averaged.

    Raises:
        UserError: damaged files; from the reader, an average that is not finite.
    """
    wanted = {name for name, tensor in model.items() if tensor.is_floating_point()}
    folder = checkpoint / FOLDER
    if (folder / WHOLE).is_file():
        opened = open_safetensors(folder / WHOLE, str(folder / WHOLE))
        if set(opened) != wanted:
            return None
        return lambda name, start, numel: _finite(
            folder, name, opened[name].reshape(-1)[start : start + numel]
        )
    if not folder.is_dir():
        return None
    reader = RankFileReader(folder)
    return (
        None
        if set(reader.names()) != wanted
        else lambda name, start, numel: _finite(folder, name, reader.read(name, WEIGHT, start, numel))
    )


def _finite(folder: Path, name: str, value: Tensor) -> Tensor:
    """Return an averaged tensor; UserError where it is not finite."""
    check_finite({name: value}, str(folder))
    return value
