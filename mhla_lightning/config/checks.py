"""Check every key of a recipe against the imported class that takes it.

`quick_checks` has judged the names of our own classes by then; here classes of other packages follow.
Importing this module imports no torch: site profiles are checked by it, too.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from mhla_lightning.arguments.hints import argument_hints, dataclass_in, takes_anything
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
    if known is None and not takes_anything(target):
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
