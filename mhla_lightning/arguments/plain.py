"""Arguments as plain values in a checkpoint, and back."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Iterator, Mapping
from typing import Any, Self, cast

from mhla_lightning.arguments.hints import argument_hints, dataclass_in, item_hint, options_of
from mhla_lightning.errors import UserError

_PLAIN = (str, int, float, bool, type(None))
_NOT_KEPT = "not_kept"


class KeepsArguments:
    """A LightningModule or LightningDataModule whose `hparams` are its constructor's arguments.

    They are plain values, which torch loads with `weights_only=True`: a dataclass becomes a mapping of its
    fields. Lightning writes them into every checkpoint.

    Lightning's own `save_hyperparameters` keeps the objects themselves, which such a load refuses. Under
    LightningCLI it keeps the configuration instead.
    """

    hparams: Any

    def __new__(cls, *arguments: Any, **named: Any) -> Self:
        made = super().__new__(cls)
        try:
            given = inspect.signature(cls.__init__).bind(made, *arguments, **named)
        except TypeError:  # the constructor tells what is wrong; a copy has no arguments
            return made
        hints = _hints(cls)
        for name, value in _flat(given):
            made.hparams[name] = plain(value, hints.get(name))
        return made


def _flat(given: inspect.BoundArguments) -> Iterator[tuple[str, Any]]:
    """Yield name and value of every argument but `self`; `**options` by their own names."""
    for name, value in list(given.arguments.items())[1:]:
        if given.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            yield from value.items()
        else:
            yield name, value


def _hints(cls: type) -> dict[str, Any]:
    try:
        return argument_hints(cls)
    except NameError:  # a class of the user's, whose annotations name what is not there
        return {}


def plain(value: Any, hint: Any = None) -> Any:
    """Return an argument as plain values; a mapping with the type's name where it cannot be one.

    Args:
        value: of the argument.
        hint: annotation of the argument; None where it has none.
    """
    try:
        return _plain(value, hint)
    except TypeError:
        return {_NOT_KEPT: type(value).__qualname__}


def _plain(value: Any, hint: Any) -> Any:
    config = dataclass_in(hint)
    if config is not None and type(value) is config:
        hints = argument_hints(config)
        return {
            field.name: _plain(getattr(value, field.name), hints.get(field.name))
            for field in dataclasses.fields(cast(Any, config))
            if field.init
        }
    if isinstance(value, Mapping):
        return {_plain(key, None): _plain(entry, None) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_plain(entry, item_hint(hint)) for entry in value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if type(value) in _PLAIN:
        return value
    raise TypeError


def restored(value: Any, hint: Any = None) -> Any:
    """Return an argument from what :func:`plain` made of it.

    Dataclasses are those that the annotation names: nothing in a checkpoint chooses a class.

    Args:
        value: plain.
        hint: annotation of the argument; None where it has none.
    """
    config = dataclass_in(hint)
    if isinstance(value, Mapping) and config is not None and config in options_of(hint):
        hints = argument_hints(config)
        return config(**{name: restored(entry, hints.get(name)) for name, entry in value.items()})
    if isinstance(value, Mapping):
        return {key: restored(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(restored(entry, item_hint(hint)) for entry in value)
    return value


def restored_arguments(kind: type, saved: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments to build an object of a checkpoint with.

    Args:
        kind: class of the object.
        saved: `hparams` of the checkpoint.
        given: arguments that replace saved ones.

    Raises:
        UserError: an argument that was no plain value, or that the checkpoint lacks, and is not given.
    """
    hints = _hints(kind)
    for name in required_arguments(kind):
        if name not in {*saved, *given}:
            reason = f"{kind.__name__} needs it, and the checkpoint has none; give it to load_from_checkpoint"
            raise UserError(name, reason)
    for name, value in saved.items():
        if isinstance(value, Mapping) and value.keys() == {_NOT_KEPT} and name not in given:
            raise UserError(
                name,
                f"a checkpoint keeps plain values only, and it was a {value[_NOT_KEPT]}; give it to "
                f"load_from_checkpoint",
            )
    own = {name: restored(value, hints.get(name)) for name, value in saved.items() if name not in given}
    return own | dict(given)


def required_arguments(kind: type) -> list[str]:
    """Return the names of the arguments that have no default."""
    # inspect.signature(kind) takes __new__ where a base has one, before Python 3.11.3.
    _, *parameters = inspect.signature(kind.__init__).parameters.values()  # type: ignore[misc]
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [each.name for each in parameters if each.kind in named and each.default is each.empty]
