"""Copy modules of this package, with all that they import of it, into one flat folder.

transformers loads a model's code from its folder: one file, and the files beside it that it imports with a
single dot. So `mhla_lightning.attention.base` becomes `attention_base.py`, and only the imports change.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import mhla_lightning

_ROOT = Path(mhla_lightning.__file__).parent
_PACKAGE = mhla_lightning.__name__


def bundle(module: str, as_name: str) -> dict[str, bytes]:
    """Return the files of a flat folder, by name.

    Args:
        module: dotted name of the module that is imported from outside.
        as_name: its name in the folder.
    """
    names: dict[str, str] = {}
    sources: dict[str, str] = {}
    waiting = [module]
    while waiting:
        current = waiting.pop()
        if current in names:
            continue
        names[current] = as_name if current == module else _flat(current)
        text = _file(current).read_text()
        waiting += [name for node in _imports(text) for name in _modules(node)]
        sources[current] = text
    files = {names[name]: _rewritten(text, names) for name, text in sources.items()}
    # transformers copies the files whose names it finds in imports of this form.
    others = sorted(files.keys() - {as_name})
    files[as_name] += "\n\nif False:\n" + "".join(f"    from .{name} import __name__\n" for name in others)
    return {f"{name}.py": text.encode() for name, text in files.items()}


def _flat(module: str) -> str:
    return module.removeprefix(f"{_PACKAGE}.").replace(".", "_")


def _file(module: str) -> Path:
    path = _ROOT.joinpath(*module.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _imports(text: str) -> Iterator[ast.ImportFrom]:
    """Yield the imports of this package, also those inside functions."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == _PACKAGE:
            yield node


def _modules(node: ast.ImportFrom) -> list[str]:
    """Return the modules that an import needs: its own, or those of the names that are modules."""
    assert node.module is not None
    inner = [f"{node.module}.{alias.name}" for alias in node.names]
    found = [name for name in inner if _file(name).is_file()]
    return found if len(found) == len(inner) else [node.module, *found]


def _rewritten(text: str, names: dict[str, str]) -> str:
    """Return a module's text with the imports of a flat folder."""
    lines = text.splitlines(keepends=True)
    for node in sorted(_imports(text), key=lambda node: -node.lineno):
        assert node.module is not None
        assert node.end_lineno is not None
        indent = " " * node.col_offset
        new = [indent + _import_of(node.module, alias, names) + "\n" for alias in node.names]
        lines[node.lineno - 1 : node.end_lineno] = new
    return "".join(_guarded(line) for line in lines)


def _import_of(module: str, alias: ast.alias, names: dict[str, str]) -> str:
    inner = f"{module}.{alias.name}"
    if inner in names and _file(inner).is_file():
        return f"from . import {names[inner]} as {alias.asname or alias.name}"
    renamed = "" if alias.asname is None else f" as {alias.asname}"
    return f"from .{names[module]} import {alias.name}{renamed}"


def _guarded(line: str) -> str:
    """Put an import of Triton into a `try`.

    transformers demands every package that is imported elsewhere, before it runs any code.
    """
    if not line.startswith(("import triton", "from triton")):
        return line
    return f"try:\n    {line}except ImportError:\n    raise\n"
