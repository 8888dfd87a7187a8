"""Code of users: modules that a recipe imports, and packages with an entry point for us.

Both run when they are imported, as any installed package does. Imports only the standard library.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from mhla_lightning.errors import UserError

GROUP = "mhla_lightning.plugins"
KEY = "imports"


@dataclass(frozen=True)
class Plugin:
    """An installed entry point of the group `mhla_lightning.plugins`.

    Attributes:
        name: of the entry point.
        module: that is imported.
        package: name and version of the distribution that brings it.
    """

    name: str
    module: str
    package: str


def plugins() -> list[Plugin]:
    """Return the installed plugins without importing them, by name."""
    found = [Plugin(point.name, point.module, _package(point)) for point in entry_points(group=GROUP)]
    return sorted(set(found), key=lambda one: (one.name, one.module))


def load_plugins(values: Mapping[str, Any] | None = None) -> list[str]:
    """Import the installed plugins, then the modules that a recipe names under `imports`.

    A module that is imported already is not imported again.

    Args:
        values: a recipe of the user's own; None means no recipe.

    Returns:
        the modules, in the order of their import.

    Raises:
        UserError: `imports` is no list of modules, or a module cannot be imported.
    """
    modules = []
    for plugin in plugins():
        where = f"plugin '{plugin.name}' of {plugin.package}"
        _import(plugin.module, None, f"{where}: {plugin.module}", "repair or uninstall that package")
        modules.append(plugin.module)
    for number, module in enumerate(named_modules(values or {})):
        advice = "install its package, or put its folder on PYTHONPATH"
        _import(module, f"{KEY}.{number}", f"'{module}'", advice)
        modules.append(module)
    return modules


def named_modules(values: Mapping[str, Any]) -> list[str]:
    """Return the modules under `imports` of a recipe.

    Raises:
        UserError: the value is no list of dotted module names.
    """
    given = values.get(KEY)
    if given is None:
        return []
    names = given if isinstance(given, list) else [given]
    for name in names:
        if not isinstance(name, str) or not all(part.isidentifier() for part in name.split(".")):
            raise UserError(
                KEY, f"{name!r} is no module; give a list of dotted names, such as [my_package.operators]"
            )
    if not isinstance(given, list):
        raise UserError(KEY, f"'{given}' is a text; write a list: [{given}]")
    return names


def packages(values: Mapping[str, Any]) -> list[str]:
    """Return the packages of the installed plugins and of the modules under `imports`.

    Nothing is imported.

    Raises:
        UserError: as :func:`named_modules`.
    """
    modules = [*(plugin.module for plugin in plugins()), *named_modules(values)]
    return list(dict.fromkeys(module.partition(".")[0] for module in modules))


def locations(module: str) -> list[Path]:
    """Return the files or folders that a module's package is in; nothing is imported."""
    spec = importlib.util.find_spec(module.partition(".")[0])
    if spec is None:
        return []
    found = [*(spec.submodule_search_locations or ()), *([spec.origin] if spec.has_location else ())]
    return [Path(str(place)).resolve() for place in found]


def _package(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist is not None else "an unknown package"


def _import(module: str, key: str | None, shown: str, advice: str) -> None:
    try:
        importlib.import_module(module)
    except UserError as error:
        raise UserError(key, f"{shown} cannot be imported: {error}") from error
    except Exception as error:  # noqa: BLE001  (any error of code that is not ours)
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(key, f"{shown} cannot be imported: {reason}; {advice}") from error
