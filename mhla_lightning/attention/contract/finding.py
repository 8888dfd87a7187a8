"""Find operator classes by name, by dotted path, or in a file."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Literal

from mhla_lightning.attention.base import Attention
from mhla_lightning.attention.entry import ATTENTION, CAUSAL_ATTENTION
from mhla_lightning.errors import UserError, unknown_name

_KEY = "operator"
Kind = Literal["bidirectional", "causal"]


def find_operators(given: str, kind: Kind | None = None) -> list[type[Attention]]:
    """Find the operators that a text names.

    Args:
        given: a registered name, a dotted class, a Python file, or file.py:CLASS. The code is imported.
        kind: of a name that both registries have; None takes both.

    Raises:
        UserError: there is no such name, module, file or class.
    """
    path, _, wanted = given.partition(":")
    if path.endswith(".py"):
        return _of_module(_load(Path(path)), wanted, path)
    module, _, name = given.rpartition(".")
    if module:
        return _of_module(_import(module), name, module)
    tables: dict[str, Mapping[str, type[Attention]]] = {
        "bidirectional": ATTENTION,
        "causal": CAUSAL_ATTENTION,
    }
    chosen = [table for one, table in tables.items() if kind in (None, one)]
    found = [table[given] for table in chosen if given in table]
    if not found:
        names = {name for table in chosen for name in table}
        raise UserError(_KEY, unknown_name("attention (and no class or file.py)", given, names))
    return found


def _load(path: Path) -> ModuleType:
    """Import a file under its own name, or the module of it that is imported already."""
    if not path.is_file():
        raise UserError(_KEY, f"the file {path} does not exist")
    loaded = sys.modules.get(path.stem)
    if loaded is not None and Path(getattr(loaded, "__file__", None) or "").resolve() == path.resolve():
        return loaded
    name = path.stem if loaded is None else f"operator_of_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # a dataclass of the file looks its module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise UserError(_KEY, f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    return module


def _import(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            _KEY, f"'{module}' cannot be imported: {error}; install its package, or name its file"
        ) from error


def _of_module(module: ModuleType, wanted: str, shown: str) -> list[type[Attention]]:
    """The operators that a module defines, or the one that is wanted."""
    found = {
        name: one
        for name, one in vars(module).items()
        if inspect.isclass(one) and issubclass(one, Attention) and not inspect.isabstract(one)
    }
    if wanted:
        if wanted not in found:
            raise UserError(_KEY, unknown_name("operator", wanted, found, of=shown))
        return [found[wanted]]
    own = [one for one in found.values() if one.__module__ == module.__name__]
    if not own:
        raise UserError(_KEY, f"{shown} defines no class derived from mhla_lightning.attention.Attention")
    return own
