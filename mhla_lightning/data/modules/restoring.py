"""Build a data module from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from lightning.pytorch import LightningDataModule

from mhla_lightning.arguments.plain import required_arguments, restored_arguments
from mhla_lightning.arguments.saved import class_named, read_saved
from mhla_lightning.errors import UserError

_POSITION = {"consumed", "data_hash"}
T = TypeVar("T", bound=LightningDataModule)


def load_data(asked: type[T], place: Any, trusted: bool, given: Mapping[str, Any]) -> T:
    """Return the data module of a checkpoint, at its position in the data.

    Args:
        asked: class of the data module, or one above it.
        place, trusted: see arguments.saved.read_saved.
        given: arguments that replace those of the checkpoint.

    Raises:
        UserError: no such checkpoint, of another class, or without arguments.
    """
    path, saved = read_saved(place, "cpu", trusted)
    # Lightning keeps the state of a data module under the name of its class.
    states = {name: value for name, value in saved.items() if isinstance(value, Mapping)}
    name = next((name for name, state in states.items() if state.keys() >= _POSITION), None)
    kind = class_named(asked, name, path)
    kept = saved.get(kind.CHECKPOINT_HYPER_PARAMS_KEY, {})
    if not kept and not given and (name is None or required_arguments(kind)):
        raise UserError(
            str(path), "it holds no arguments of a data module, because none of ours trained it; give them"
        )
    data = kind(**restored_arguments(kind, kept, given))
    if name is not None:
        data.load_state_dict(saved[name])
    return data
