"""Check which classes a recipe that may come from a stranger names.

A class runs code when it is imported or built. The first check reads the recipe alone and imports nothing:
every class is of an allowed package. The second resolves the classes: each is what its argument takes, and is
defined in an allowed package, too. `torch` imports `subprocess`, so that the name of a package says nothing
about a class behind it.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Collection, Mapping
from enum import Enum
from typing import Any

import yaml

from mhla_lightning.arguments.hints import argument_hints, dataclass_in, item_hint, options_of
from mhla_lightning.config.checks import import_class
from mhla_lightning.config.recipes import parse_yaml
from mhla_lightning.errors import UserError
from mhla_lightning.plugins import KEY

LIBRARIES = ("mhla_lightning", "torch", "lightning", "pytorch_lightning")
_PLAIN = ("builtins", "collections.abc", "datetime", "pathlib", "typing")
"""Modules whose types hold plain values, or lists and mappings of anything."""
_CODE = (Callable, type)


def check_packages(value: Any, where: str, packages: Collection[str]) -> None:
    """Refuse classes of other packages, at any depth; imports nothing.

    Args:
        value: of a recipe.
        where: its dotted key.
        packages: that are allowed beside our own, torch and Lightning.

    Raises:
        UserError: the first class of another package, or a class inside a text.
    """
    if isinstance(value, list):
        for number, item in enumerate(value):
            check_packages(item, f"{where}.{number}", packages)
    elif isinstance(value, Mapping):
        if "class_path" in value:
            _check_path(value["class_path"], f"{where}.class_path", packages)
        for key, item in value.items():
            name = where if key == "init_args" else f"{where}.{key}"
            if key != "class_path":
                check_packages(item, name, packages)
    elif _holds_class(value):
        raise UserError(where, "it is a text that names a class; write the entry as a mapping")


def check_kinds(value: Any, hint: Any, where: str, packages: Collection[str]) -> None:
    """Refuse classes where the argument takes none, or takes another kind; at any depth.

    It imports the classes, so :func:`check_packages` comes first.

    Args:
        value: of an argument.
        hint: the annotation of the argument; None where it has none.
        where, packages: see :func:`check_packages`.

    Raises:
        UserError: the first such class, or a text that would be imported.
    """
    if isinstance(value, list):
        for number, item in enumerate(value):
            check_kinds(item, item_hint(hint), f"{where}.{number}", packages)
    elif isinstance(value, Mapping):
        _check_mapping(value, hint, where, packages)
    elif isinstance(value, str) and _imports_text(value, hint):
        raise UserError(where, f"'{value}' would be imported; write the entry as a mapping")


def _check_mapping(value: Mapping[str, Any], hint: Any, where: str, packages: Collection[str]) -> None:
    if "class_path" in value:
        target = _class(str(value["class_path"]), hint, where, packages)
        hints, value = argument_hints(target), value.get("init_args") or {}
    else:
        config = dataclass_in(hint)
        hints = argument_hints(config) if config is not None else dict.fromkeys(value, _value_hint(hint))
    if not isinstance(value, Mapping):
        raise UserError(where, f"{value!r} does not fit; it must be a mapping")
    for key, item in value.items():
        check_kinds(item, hints.get(key), f"{where}.{key}", packages)


def _class(path: str, hint: Any, where: str, packages: Collection[str]) -> type:
    """Import a class, and check that its argument takes it."""
    kinds = tuple(kind for kind in _objects(hint) if isinstance(kind, type) and kind not in _CODE)
    if not kinds:
        raise UserError(f"{where}.class_path", f"'{path}' is a class, and only plain values are allowed here")
    found = import_class(path, where)
    allowed = {*LIBRARIES, *packages}
    if not issubclass(found, kinds) or found.__module__.partition(".")[0] not in allowed:
        names = " or ".join(kind.__name__ for kind in kinds)
        raise UserError(f"{where}.class_path", f"'{path}' does not fit; it must be a class of {names}")
    return found


def _imports_text(text: str, hint: Any) -> bool:
    """Whether Lightning's parser may import a text, or read the file that it names.

    It does where an argument takes an object or a function. Where it takes texts as well, a word is harmless.
    """
    return bool(_objects(hint)) and (str not in options_of(hint) or "." in text)


def _objects(hint: Any) -> list[Any]:
    """The types of an annotation that take objects or functions, not only plain values."""
    kinds = [typing.get_origin(option) or option for option in options_of(hint)]
    return [
        kind
        for kind in kinds
        if kind in _CODE
        or (isinstance(kind, type) and not issubclass(kind, Enum) and kind.__module__ not in _PLAIN)
    ]


def _value_hint(hint: Any) -> Any:
    """Y of `dict[X, Y]` in an annotation; None where there is none."""
    arguments = [typing.get_args(option) for option in options_of(hint)]
    return next((found[1] for found in arguments if len(found) == 2), None)


def _check_path(path: Any, where: str, packages: Collection[str]) -> None:
    parts = path.split(".") if isinstance(path, str) else []
    if len(parts) < 2 or not all(part.isidentifier() and not part.startswith("__") for part in parts):
        raise UserError(where, f"{path!r} is no class; give its dotted path, such as torch.nn.Identity")
    if parts[0] not in {*LIBRARIES, *packages}:
        raise UserError(
            where,
            f"'{path}' is not imported; allowed are classes of {', '.join(LIBRARIES[:3])}, of installed "
            f"plugins, and of packages that the recipe names under `{KEY}`",
        )


def _parsed(text: str) -> Any:
    """A text as YAML, which Lightning's parser reads it as."""
    try:
        return parse_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return text


def _holds_class(value: Any) -> bool:
    """Whether a text names a class once it is parsed, or a text in it does."""
    if isinstance(value, Mapping):
        return "class_path" in value or any(map(_holds_class, value.values()))
    if isinstance(value, list):
        return any(map(_holds_class, value))
    if not isinstance(value, str):
        return False
    parsed = _parsed(value)
    return parsed != value and _holds_class(parsed)
