"""Find the one value of a recipe that its class refuses.

jsonargparse reports the whole nest of types that a value did not fit. Here every argument is parsed alone
until one fails: its key is then known, and its annotation says what is allowed.
"""

from __future__ import annotations

import argparse
import inspect
import sys
import typing
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

from jsonargparse import ArgumentParser

from mhla_lightning.arguments.hints import argument_hints, dataclass_in, item_hint, options_of
from mhla_lightning.config.checks import import_class
from mhla_lightning.errors import DataError, UserError, below

_NAMES = {
    float: "a number",
    int: "a whole number",
    bool: "true or false",
    str: "a text",
    type(None): "null",
    list: "a list",
    tuple: "a list",
    dict: "a mapping",
}


def find_mistake(value: Any, hint: Any, key: str) -> UserError | None:
    """Return the error of the innermost value that does not fit; None where all fit.

    Args:
        value: of a recipe.
        hint: the annotation of the argument that takes it.
        key: dotted key of the argument.
    """
    refusal = _refusal(value, hint)
    if refusal is None:
        return None
    missing = _missing(value, hint, key)
    if missing is not None:
        return missing
    for item, inner, name in _inside(value, hint, key):
        found = find_mistake(item, inner, name)
        if found is not None:
            return found
    own = user_error(refusal)
    if own is not None:
        return placed(own, key)
    if isinstance(value, Mapping) and "class_path" in value:
        cause = _cause(refusal)
        if isinstance(cause, (TypeError, ImportError, *_lightnings_errors())):  # of the class itself
            return UserError(key, f"{value['class_path']} cannot be built: {' '.join(str(cause).split())}")
        return UserError(key, f"{value['class_path']} does not fit; it must be {_described(hint)}")
    return UserError(key, f"{value!r} does not fit; it must be {_described(hint)}")


def _cause(error: BaseException) -> BaseException:
    """The missing package in a chain of errors, else the first error of the chain."""
    while (
        not isinstance(error, ImportError) and (earlier := error.__cause__ or error.__context__) is not None
    ):
        error = earlier
    return error


def user_error(error: BaseException) -> UserError | None:
    """Return the UserError that caused an error, or that it is."""
    inner: BaseException | None = error
    while inner is not None and not isinstance(inner, UserError):
        inner = inner.__cause__ or inner.__context__
    return inner


def placed(error: UserError, section: str) -> UserError:
    """Return an error with its key below `section`, as `errors.inside` does."""
    if isinstance(error, DataError) or error.key is None:
        return error
    return UserError(below(section, error.key), error.reason)


def _lightnings_errors() -> tuple[type[Exception], ...]:
    """Return Lightning's own error, where Lightning is imported.

    `submit` checks profiles without it.
    """
    module = sys.modules.get("lightning.pytorch.utilities.exceptions")
    return (module.MisconfigurationException,) if module is not None else ()


def _refusal(value: Any, hint: Any) -> Exception | None:
    """The error of a parser with this one argument."""
    parser = ArgumentParser(exit_on_error=False)
    try:
        parser.add_argument("--value", type=hint)
    except (TypeError, ValueError):  # an annotation that jsonargparse does not check
        return None
    try:
        parser.instantiate(parser.parse_object({"value": deepcopy(value)}))  # it changes lists
    except Exception as error:
        if isinstance(
            error,
            (argparse.ArgumentError, TypeError, ValueError, ImportError, UserError, *_lightnings_errors()),
        ):
            return error
        raise
    return None


def _inside(value: Any, hint: Any, key: str) -> list[tuple[Any, Any, str]]:
    """(value, annotation, key) of what a value holds."""
    if isinstance(value, list):
        inner = item_hint(hint)
        return [] if inner is None else [(v, inner, f"{key}.{n}") for n, v in enumerate(value)]
    if not isinstance(value, Mapping):
        return []
    if "class_path" in value:
        target: type | None = import_class(str(value["class_path"]), key)
        value = value.get("init_args") or {}
    else:
        target = dataclass_in(hint)
    hints = argument_hints(target) if target is not None else {}
    return [(item, hints[name], f"{key}.{name}") for name, item in value.items() if name in hints]


def _missing(value: Any, hint: Any, key: str) -> UserError | None:
    """The error of a class or a dataclass without an argument that it needs."""
    if not isinstance(value, Mapping):
        return None
    if "class_path" in value:
        target: type | None = import_class(str(value["class_path"]), key)
        value = value.get("init_args") or {}
    else:
        target = dataclass_in(hint)
    if target is None:
        return None
    hints = argument_hints(target)
    for name, argument in inspect.signature(target).parameters.items():
        named = argument.kind not in (argument.VAR_POSITIONAL, argument.VAR_KEYWORD)
        if named and argument.default is argument.empty and name not in value:
            return UserError(f"{key}.{name}", f"it is missing; it must be {_described(hints.get(name))}")
    return None


def _described(hint: Any) -> str:
    """An annotation in words: `a number or null`."""
    words = []
    for option in options_of(hint):
        origin = typing.get_origin(option) or option
        if origin is typing.Literal:
            words.append(f"one of {', '.join(map(str, typing.get_args(option)))}")
        elif isinstance(origin, type):
            list_like = issubclass(origin, Sequence) and origin is not str
            kind = (
                list if list_like else dict if dataclass_in(origin) or issubclass(origin, Mapping) else origin
            )
            words.append(_NAMES.get(kind, f"a class of {origin.__name__}"))
        else:
            words.append(str(option))
    return " or ".join(dict.fromkeys(words))
