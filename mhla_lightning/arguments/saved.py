"""Checkpoints from which a task or a data module is built anew."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar
from zipfile import is_zipfile

import torch

from mhla_lightning.errors import UserError

_FILE = "trainer.ckpt"  # Lightning's file in a checkpoint folder of ours
T = TypeVar("T")


def read_saved(place: Any, map_location: Any = None, trusted: bool = False) -> tuple[Path, dict[str, Any]]:
    """Read a checkpoint, and return its file and Lightning's dict.

    Args:
        place: a file of Lightning's, or a checkpoint folder of ours.
        map_location: as in torch.load; None takes the devices of the checkpoint, else the CPU.
        trusted: unpickle any object, which runs code of the file.

    Raises:
        UserError: no checkpoint, a damaged one, or one with pickled objects that is not trusted.
    """
    path = Path(place)
    path = path / _FILE if path.is_dir() else path
    if not path.is_file():
        raise UserError(
            str(place), "there is no checkpoint; give a .ckpt file, or a folder `step-...` of a run"
        )
    if map_location is None and not torch.cuda.is_available():
        map_location = "cpu"
    try:
        saved = torch.load(path, map_location=map_location, weights_only=not trusted)
    except UnpicklingError as error:
        reason = "it holds more than tensors and plain values; weights_only=False runs the code that it names"
        raise UserError(str(path), reason) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        if is_zipfile(path):
            raise
        raise UserError(str(path), "it is damaged, or no checkpoint of Lightning's") from error
    if not isinstance(saved, dict):
        raise UserError(str(path), f"it holds a {type(saved).__name__}, and no checkpoint of Lightning's")
    return path, saved


def refuse_hparams(file: Any) -> None:
    """Refuse Lightning's `hparams_file`. Raises UserError."""
    if file is not None:
        raise UserError("hparams_file", "the arguments are in the checkpoint; leave it out")


def class_named(asked: type[T], name: str | None, path: Path) -> type[T]:
    """Return the class that a checkpoint is of, among those that are imported.

    A class below the saved one takes its checkpoint too.

    Args:
        asked: class whose `load_from_checkpoint` was called.
        name: of the saved class; None where the checkpoint names none.
        path: of the checkpoint, for the message.

    Raises:
        UserError: another class, or several of this name.
    """
    if name is None or name in {base.__name__ for base in asked.__mro__}:
        return asked
    # A notebook's cell that runs again defines its class again: the last one is meant.
    named = (kind for kind in _below(asked) if kind.__name__ == name)
    found = list({(kind.__module__, kind.__qualname__): kind for kind in named}.values())
    if len(found) != 1:
        hint = "import its class first" if not found else f"{len(found)} classes have this name; call its own"
        raise UserError(str(path), f"it is of {name}, which is no {asked.__name__} imported here: {hint}")
    return found[0]


def _below(kind: type[T]) -> Iterator[type[T]]:
    for direct in kind.__subclasses__():
        yield direct
        yield from _below(direct)
