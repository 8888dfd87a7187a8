"""The tables of this folder name every private name that the package uses."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

from tests.house.layers import module_of
from tests.house.names import private_uses
from tests.house.source import PACKAGE, ROOT, package_files, tree_of


def listed() -> set[str]:
    """Return the names in the tables."""
    names: set[str] = set()
    for path in Path(__file__).parent.glob("test_*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "SYMBOLS":
                assert node.value is not None
                names |= set(ast.literal_eval(node.value))
    return names


def test_every_use_is_listed() -> None:
    unlisted = [str(found) for found in private_uses() if name_in(found.text) not in listed()]
    assert not unlisted, "private names of other libraries without an entry in tests/private_api"


def name_in(text: str) -> str:
    """Return the private name of a finding: `._x`, `from y: _x` or `getattr '_x'`."""
    return re.findall(r"\b_\w+", text)[-1]


def test_every_entry_is_used() -> None:
    """The names occur in the package, as attributes, in imports or as methods."""
    sources = "\n".join((ROOT / path).read_text(encoding="utf-8") for path in package_files())
    assert [name for name in sorted(listed()) if not re.search(rf"\b{name}\b", sources)] == []


def candidates() -> list[tuple[str, str, list[str]]]:
    """Return classes with private methods and a base of another package: module, name, methods."""
    found = []
    for path in package_files():
        tree = tree_of(path)
        foreign = {
            (alias.asname or alias.name).split(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom | ast.Import)
            and not (isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE))
            for alias in node.names
        }
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and any(
                ast.unparse(base).split(".")[0] in foreign - {"nn", "ABC", "Protocol"} for base in node.bases
            ):
                methods = [
                    part.name
                    for part in node.body
                    if isinstance(part, ast.FunctionDef) and re.match(r"_[^_]", part.name)
                ]
                found += [(module_of(path), node.name, methods)] if methods else []
    return found


@pytest.mark.slow  # imports transformers, lm_eval and all that stands on them
def test_every_overridden_method_is_listed() -> None:
    overridden = set()
    for module, name, methods in candidates():
        try:
            kind = getattr(importlib.import_module(module), name)
        except ImportError:  # an optional package
            continue
        foreign = [base for base in kind.__mro__[1:] if not base.__module__.startswith(PACKAGE)]
        overridden |= {method for method in methods if any(method in vars(base) for base in foreign)}
    assert overridden
    assert overridden <= listed()
