"""Check every key of a recipe against the imported class that takes it.

`quick_checks` has judged the names of our own classes by then; here classes of other packages follow.
Importing this module imports no torch: site profiles are checked by it, too.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from mhla_lightning.config.quick_checks import check_known, check_sections
from mhla_lightning.config.signatures import find_class, parameters
from mhla_lightning.errors import UserError, unknown_name


def check_keys(values: Mapping[str, Any]) -> None:
    """Check sections, trainer keys and the arguments of every class that the recipe names.

    Raises:
        UserError: the first key that nothing takes, with the nearest valid one.
    """
    from lightning.pytorch import Trainer

    check_sections(
        values, [name for name in inspect.signature(Trainer.__init__).parameters if name != "self"]
    )
    for section in ("trainer", "model", "data"):
        _check_value(values[section], section)


def _check_value(value: Any, where: str) -> None:
    """Check the classes in a part of a recipe, at any depth."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            _check_value(item, f"{where}.{index}")
    if not isinstance(value, Mapping):
        return
    if "class_path" not in value:
        for key, item in value.items():
            _check_value(item, f"{where}.{key}")
        return
    check_known(value, ("class_path", "init_args"), f"{where}.")
    arguments = value.get("init_args") or {}
    target = import_class(str(value["class_path"]), where)
    source = find_class(str(value["class_path"]))
    known = parameters(source) if source is not None else None
    if known is None and not _takes_anything(target):
        known = dict.fromkeys(inspect.signature(target).parameters)
    if known is not None:
        check_known(arguments, known, f"{where}.")
    hints = argument_hints(target)
    for key, item in arguments.items():
        check_argument(item, dataclass_in(hints.get(key)), f"{where}.{key}")


def check_argument(value: Any, config: type | None, where: str) -> None:
    """Check the keys of a value that may be a configuration, a list of them, or hold classes.

    Args:
        value: of an argument.
        config: the dataclass that the argument takes, or a list of them; None where it takes none.
        where: dotted key of the argument; empty for the top of a file.

    Raises:
        UserError: a key that nothing takes.
    """
    prefix = f"{where}." if where else ""
    if isinstance(value, list):
        for number, item in enumerate(value):
            check_argument(item, config, f"{prefix}{number}")
    elif isinstance(value, Mapping) and "class_path" not in value and config is not None:
        hints = argument_hints(config)
        check_known(value, hints, prefix)
        for key, item in value.items():
            check_argument(item, dataclass_in(hints[key]), f"{prefix}{key}")
    elif isinstance(value, Mapping):
        _check_value(value, where)


def argument_hints(target: type) -> dict[str, Any]:
    """Return the readable annotations of the arguments that a class takes."""
    hints: dict[str, Any] = {}
    for base in inspect.getmro(target):
        init = base.__dict__.get("__init__")
        if inspect.isfunction(init):
            hints = {**_readable_hints(init), **hints}
            if not _takes_anything(init):  # it gives its base what the base needs
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


def _takes_anything(target: Callable[..., Any]) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(target).parameters.values())


def import_class(path: str, where: str) -> type:
    """Import the class of a dotted path.

    Args:
        path: dotted path.
        where: place of the entry in the recipe, for the error.

    Raises:
        UserError: no such module or class.
    """
    module, _, name = path.rpartition(".")
    try:
        loaded = importlib.import_module(module)
    except (ImportError, ValueError) as error:
        raise UserError(f"{where}.class_path", f"'{path}' cannot be imported: {error}") from error
    found = getattr(loaded, name, None)
    if not isinstance(found, type):
        public = getattr(loaded, "__all__", dir(loaded))
        valid = [other for other in public if isinstance(getattr(loaded, other, None), type)]
        raise UserError(f"{where}.class_path", unknown_name(f"class of {module}", name, valid))
    return found


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
