"""Which room may import which: one ordered list, and the imports that break it."""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from tests.house.source import PACKAGE, Finding, dotted, nodes, package_trees, tree_of

# Top down: a room imports rooms of lower layers only, at the top of a file or inside a function alike.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("__main__",),
    ("api", "lightning_cli"),
    ("cli",),
    ("report", "evidence"),
    ("bench", "training", "compare"),
    ("conversion", "evaluation"),
    ("hf",),
    ("integrations", "callbacks"),
    ("analysis",),
    ("planning", "inference", "cluster"),
    ("config",),
    ("tasks", "strategies"),
    ("backbones", "checkpoints"),
    ("weights",),
    ("attention", "data", "diffusion", "runs"),
    ("arguments", "finite", "plugins", "randomness", "textfiles"),
    ("errors",),
)
PERMITTED = {("bench", "training")}  # edges inside a layer


@dataclass(frozen=True)
class Import:
    """One import of a module of ours in another."""

    source: str
    target: str
    path: str
    line: int


def module_of(path: str) -> str:
    """Return the module of a file: `callbacks/ema.py` -> `mhla_lightning.callbacks.ema`."""
    name = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return name if name.split(".")[0] == PACKAGE else f"{PACKAGE}.{name}"


def room_of(module: str) -> str:
    """Return the part of the package that a module is in; empty for the package's own __init__."""
    return module.split(".")[1] if "." in module else ""


def imports(sources: Mapping[str, ast.Module] | None = None) -> list[Import]:
    """Return every import between modules of the package.

    Imports inside functions, for type checkers, and by `import_module` with a literal name count too.

    Args:
        sources: parsed files by path; None takes those of the package.
    """
    trees = package_trees() if sources is None else sources
    modules = {module_of(path) for path in trees}
    return [
        Import(module_of(path), target, path, line)
        for path, tree in trees.items()
        for line, target in _targets(tree, modules, path)
    ]


def _targets(tree: ast.Module, modules: set[str], path: str) -> Iterator[tuple[int, str]]:
    """Yield line and module of the imports of a file, without the package itself."""
    for line, names in _statements(tree, module_of(path), path.endswith("__init__.py")):
        for name in names:
            while name not in modules and "." in name:  # `from module import function`
                name = name.rpartition(".")[0]
            if name in modules and name not in (PACKAGE, module_of(path)):
                yield line, name


@cache
def _statements(tree: ast.Module, source: str, is_package: bool) -> list[tuple[int, set[str]]]:
    """Return line and names of every import of a file; the trees of the package are read once."""
    named = ((node, _imported(node, source, is_package)) for node in nodes(tree))
    return [(node.lineno, names) for node, names in named if names]  # type: ignore[attr-defined]


def _imported(node: ast.AST, source: str, is_package: bool) -> set[str]:
    """Return the dotted names that a statement imports, with the names behind `from`."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        base = [node.module] if node.module else []
        if node.level:
            parts = source.split(".")
            base = parts[: len(parts) - node.level + is_package] + base
        return {".".join([*base, alias.name]) for alias in node.names}
    if isinstance(node, ast.Call) and _called(node).endswith(("import_module", "__import__")):
        first = node.args[0] if node.args else None
        if isinstance(first, ast.JoinedStr) and first.values:
            first = first.values[0]
        if isinstance(first, ast.Constant) and isinstance(first.value, str):
            return {first.value.rstrip(".")}
    return set()


def _called(node: ast.Call) -> str:
    """Return the last name of what is called."""
    return node.func.attr if isinstance(node.func, ast.Attribute) else dotted(node.func)


def foreign_imports(path: str) -> list[tuple[int, str]]:
    """Return line and first name of every library other than ours that a file imports."""
    return [
        (line, name.split(".")[0])
        for line, names in _statements(tree_of(path), module_of(path), path.endswith("__init__.py"))
        for name in sorted(names)
        if name.split(".")[0] not in (PACKAGE, "__future__", *sys.stdlib_module_names)
    ]


def upward(edges: Iterable[Import]) -> list[Finding]:
    """Return the imports that run up a layer, or sideways where that is not permitted."""
    level = {room: number for number, rooms in enumerate(LAYERS) for room in rooms}
    found = []
    for edge in edges:
        a, b = room_of(edge.source), room_of(edge.target)
        if not a or a == b:
            continue
        if a not in level or b not in level:
            missing = a if a not in level else b
            found.append(Finding(edge.path, edge.line, f"room '{missing}' has no layer"))
        elif level[a] > level[b] or (level[a] == level[b] and (a, b) not in PERMITTED):
            found.append(Finding(edge.path, edge.line, f"{a} imports {edge.target}, which is no lower layer"))
    return found


def rings(edges: Iterable[Import]) -> list[list[str]]:
    """Return the rings of rooms, of the parts of a room (its files and folders), and of modules."""
    edges = list(edges)
    graphs: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for edge in edges:
        a, b = edge.source.split("."), edge.target.split(".")
        graphs["modules"][edge.source].add(edge.target)
        depth = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
        if depth is None:  # a package and its own part: seen among the modules
            continue
        parent = ".".join(a[:depth])
        graphs[parent][".".join(a[: depth + 1])].add(".".join(b[: depth + 1]))
    found = {tuple(sorted(ring)) for graph in graphs.values() for ring in _components(graph)}
    return sorted(list(ring) for ring in found)


def _components(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Return the strongly connected components of two nodes or more (Tarjan)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph.get(node, ()):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            ring = [stack.pop()]
            while ring[-1] != node:
                ring.append(stack.pop())
            if len(ring) > 1:
                found.append(ring)

    sys.setrecursionlimit(10_000)
    for node in list(graph):
        if node not in index:
            visit(node)
    return found
