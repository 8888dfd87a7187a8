"""Annotations of the arguments that a class takes."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable
from contextlib import suppress
from typing import Any


def argument_hints(target: type) -> dict[str, Any]:
    """Return the readable annotations of the arguments that a class takes."""
    hints: dict[str, Any] = {}
    for base in inspect.getmro(target):
        init = base.__dict__.get("__init__")
        if inspect.isfunction(init):
            hints = {**_readable_hints(init), **hints}
            if not takes_anything(init):  # it gives its base what the base needs
                break
    return {name: hint for name, hint in hints.items() if name != "return"}


def _readable_hints(function: types.FunctionType) -> dict[str, Any]:
    """Return the annotations of a function whose names exist at run time.

    Lightning's WandbLogger has such a name.
    """
    try:
        return typing.get_type_hints(function)
    except NameError:
        found: dict[str, Any] = {}
        for name, hint in function.__annotations__.items():
            with suppress(NameError):
                alone = types.SimpleNamespace(__annotations__={name: hint})
                found |= typing.get_type_hints(alone, function.__globals__)
        return found


def takes_anything(target: Callable[..., Any]) -> bool:
    """Return whether a function has a parameter `**options`."""
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(target).parameters.values())


def dataclass_in(hint: Any) -> type | None:
    """Return the dataclass of an annotation `Config`, `Config | None` or `list[Config] | None`."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    options = tuple(inner for option in options for inner in (typing.get_args(option) or (option,)))
    return next((one for one in options if isinstance(one, type) and dataclasses.is_dataclass(one)), None)


def options_of(hint: Any) -> tuple[Any, ...]:
    """Return the types of a union; of any other annotation itself."""
    union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    return typing.get_args(hint) if union else (hint,)


def item_hint(hint: Any) -> Any:
    """Return X of `list[X]`, `Sequence[X]` or of a union with one of them, or None."""
    for option in options_of(hint):
        arguments = typing.get_args(option)
        if len(arguments) == 1 and typing.get_origin(option) is not typing.Literal:
            return arguments[0]
    return None
