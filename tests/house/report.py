"""`make house`: measures the layout, the names and the prose of the package; fails when a bound is exceeded.

    python -m tests.house.report [--list NAME]

`--list` prints every finding of one row, with file and line.
"""

from __future__ import annotations

import argparse
import ast
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = "mhla_lightning"
# Top down: a room imports rooms of lower layers only, at the top of a file or inside a function alike.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("__main__",),
    ("cli",),
    ("bench", "training", "compare"),
    ("conversion", "evaluation", "analysis"),
    ("hf",),
    ("integrations", "callbacks"),
    ("planning", "inference", "cluster"),
    ("config",),
    ("tasks", "strategies"),
    ("backbones", "checkpoints"),
    ("weights",),
    ("attention", "data", "diffusion", "runs"),
    ("errors", "randomness"),
)
PERMITTED = {("bench", "training")}  # edges inside a layer
LINE = 110
HEADING = 90  # characters of a docstring's first line
WORDS = 25  # of a sentence
BANNED = re.compile(
    r"\bis one sentence\b|gone on from|goes on from|what that has no|is told in one|stands for itself"
    r"|so that many|\bthe sentence for\b|that what\b|\bwhoever\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Finding:
    """One place: file, line and what is there."""

    path: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line} {self.text}"


@dataclass(frozen=True)
class Import:
    """One import of a module of ours in another."""

    source: str
    target: str
    path: str
    line: int


def tracked(pattern: str = "*.py", folder: Path = ROOT) -> list[str]:
    """Files of the checkout, tracked or new, links left out."""
    command = ["git", "ls-files", "-co", "--exclude-standard", pattern]
    names = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.split()
    return sorted({name for name in names if (folder / name).is_file() and not (folder / name).is_symlink()})


def package_files() -> list[str]:
    """Python files of the package, those behind its links included."""
    return [name for name in tracked() if name.split("/")[0] in (PACKAGE, "callbacks", "cluster")]


@cache
def tree_of(path: str) -> ast.Module:
    """The parsed file."""
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def module_of(path: str) -> str:
    """`callbacks/ema.py` -> `mhla_lightning.callbacks.ema`."""
    name = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return name if name.split(".")[0] == PACKAGE else f"{PACKAGE}.{name}"


def room_of(module: str) -> str:
    """The part of the package that a module is in; empty for the package's own __init__."""
    return module.split(".")[1] if "." in module else ""


def imports(files: Iterable[str], sources: Mapping[str, ast.Module] | None = None) -> list[Import]:
    """Every import between modules of the package, lazy ones and those for type checkers included."""
    trees = {path: tree_of(path) for path in files} if sources is None else sources
    modules = {module_of(path) for path in trees}
    found = []
    for path, tree in trees.items():
        for node in ast.walk(tree):
            for target in _targets(node, modules, module_of(path), path.endswith("__init__.py")):
                if target != module_of(path):
                    found.append(Import(module_of(path), target, path, node.lineno))  # type: ignore[attr-defined]
    return found


def _targets(node: ast.AST, modules: set[str], source: str, is_package: bool) -> Iterator[str]:
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            parts = source.split(".")[: len(source.split(".")) - node.level + is_package]
            base = ".".join([*parts, *([node.module] if node.module else [])])
        names = [
            f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules else base for alias in node.names
        ]
    else:
        return
    yield from {name for name in names if name in modules and name != PACKAGE}


def upward(edges: Iterable[Import]) -> list[Finding]:
    """Imports that run up a layer, or sideways where that is not permitted."""
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
    """Rings of rooms, of the parts of a room (its files and folders), and of modules."""
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
    """Strongly connected components of two nodes or more (Tarjan)."""
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


def private_uses() -> list[Finding]:
    """Underscored names of other libraries: imported, read as attributes, or set on their objects."""
    ours: set[str] = set()
    for path in package_files():
        ours |= _own_private_names(tree_of(path))
    found = []
    for path in package_files():
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Attribute) and _is_private(node.attr) and node.attr not in ours:
                found.append(Finding(path, node.lineno, f".{node.attr}"))
            elif isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith(PACKAGE):
                private = [part for part in node.module.split(".") if _is_private(part)]
                private += [alias.name for alias in node.names if _is_private(alias.name)]
                found += [Finding(path, node.lineno, f"from {node.module}: {name}") for name in private]
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                found += _private_by_string(path, node, ours)
    return sorted(set(found), key=lambda f: (f.path, f.line, f.text))


def _private_by_string(path: str, node: ast.Call, ours: set[str]) -> list[Finding]:
    assert isinstance(node.func, ast.Name)
    if node.func.id not in ("getattr", "setattr", "hasattr") or len(node.args) < 2:
        return []
    name = node.args[1]
    if isinstance(name, ast.Constant) and isinstance(name.value, str) and _is_private(name.value):
        if name.value not in ours:
            return [Finding(path, node.lineno, f"{node.func.id} '{name.value}'")]
    return []


_PUBLIC = ("_", "_asdict", "_exit", "_replace", "_typeshed")  # documented by Python


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in _PUBLIC


def _own_private_names(tree: ast.Module) -> set[str]:
    """Underscored names that the package defines: functions, classes, variables, attributes of self."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            if not any("override" in ast.unparse(d) for d in node.decorator_list):
                names.add(node.name)
        elif isinstance(node, ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                for part in ast.walk(target):
                    if isinstance(part, ast.Name):
                        names.add(part.id)
                    elif isinstance(part, ast.Attribute) and ast.unparse(part.value) == "self":
                        names.add(part.attr)
    return {name for name in names if _is_private(name)}


def parameters() -> list[Finding]:
    """Functions of more than 10 parameters, self not counted."""
    return [f for f in _parameter_counts() if int(f.text.split()[0]) > 10]


def _parameter_counts() -> list[Finding]:
    found = []
    for path in package_files():
        for node in ast.walk(tree_of(path)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
                count = sum(a.arg not in ("self", "cls") for a in arguments)
                found.append(Finding(path, node.lineno, f"{count} parameters: {node.name}"))
    return found


def long_lines() -> list[Finding]:
    """Lines of Python over the length."""
    return [
        Finding(path, number, f"{len(line)} characters")
        for path in tracked()
        for number, line in enumerate((ROOT / path).read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > LINE
    ]


def homonyms() -> list[Finding]:
    """Class names that more than one class of the package has."""
    places: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for path in package_files():
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ClassDef):
                places[node.name].append((path, node.lineno))
    return [
        Finding(where[0][0], where[0][1], f"class {name} also in {', '.join(p for p, _ in where[1:])}")
        for name, where in sorted(places.items())
        if len(where) > 1
    ]


def by_string() -> list[Finding]:
    """`getattr` or `hasattr` with a literal name on a strategy, trainer or task: a protocol by strings."""
    found = []
    for path in package_files():
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                if node.func.id in ("getattr", "hasattr") and len(node.args) > 1:
                    target = ast.unparse(node.args[0])
                    if isinstance(node.args[1], ast.Constant) and re.search(
                        r"strategy|trainer|task|module\b", target
                    ):
                        found.append(Finding(path, node.lineno, ast.unparse(node)))
    return found


def docstrings() -> Iterator[tuple[str, int, str]]:
    """Every docstring of the package."""
    for path in package_files():
        for node in ast.walk(tree_of(path)):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = ast.get_docstring(node)
                if text:
                    yield path, getattr(node, "lineno", 1), text


def headings() -> list[Finding]:
    """Docstrings whose first line is too long, or runs on into the second."""
    found = []
    for path, line, text in docstrings():
        first, *rest = text.splitlines()
        if len(first) > HEADING or (rest and rest[0].strip()):
            found.append(Finding(path, line, first[:70]))
    return found


def long_sentences() -> list[Finding]:
    """Sentences of docstrings with more than 25 words."""
    found = []
    for path, line, text in docstrings():
        for paragraph in re.split(r"\n\s*\n|\n(?=\s*[\w`*., ]{1,40}: )", text):
            if ">>>" in paragraph or "|" in paragraph:
                continue
            for sentence in re.split(r"(?<=[.?!])\s+", " ".join(paragraph.split())):
                if len(sentence.split()) > WORDS:
                    found.append(Finding(path, line, sentence[:90]))
    return found


def banned_phrases() -> list[Finding]:
    """Phrases that a newcomer must decode, in code, recipes and guides."""
    found = []
    for path in [*package_files(), *tracked("*.md"), *tracked("*.yaml")]:
        for number, line in enumerate((ROOT / path).read_text(encoding="utf-8").splitlines(), 1):
            if BANNED.search(line):
                found.append(Finding(path, number, line.strip()[:90]))
    return found


def readme_lines() -> int:
    """Lines of the README."""
    return len((ROOT / "README.md").read_text(encoding="utf-8").splitlines())


def measures() -> dict[str, tuple[float, float, list[Finding]]]:
    """Row -> value, bound, findings."""
    edges = imports(package_files())
    found_rings = [Finding("", 0, " <-> ".join(ring)) for ring in rings(edges)]
    lines = long_lines()
    total = sum(len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in tracked())
    most = max(int(f.text.split()[0]) for f in _parameter_counts())
    rows: dict[str, tuple[float, float, list[Finding]]] = {}
    rows["rings of rooms, folders and modules"] = (len(found_rings), 0, found_rings)
    rows["arrows that run up"] = (len(upward(edges)), 0, upward(edges))
    rows["private names of other libraries"] = (len(private_uses()), 19, private_uses())
    rows["most parameters of a function"] = (most, 10, parameters())
    rows["lines over 110 characters, %"] = (round(100 * len(lines) / total, 2), 1, lines)
    rows["class names with two meanings"] = (len(homonyms()), 0, homonyms())
    rows["protocols by strings"] = (len(by_string()), 0, by_string())
    rows["lines of the README"] = (readme_lines(), 150, [])
    rows["docstrings with a long first line"] = (len(headings()), 0, headings())
    rows["sentences over 25 words"] = (len(long_sentences()), 0, long_sentences())
    rows["phrases to decode"] = (len(banned_phrases()), 0, banned_phrases())
    return rows


def main() -> int:
    """Prints the table; returns 1 when a bound is exceeded."""
    parser = argparse.ArgumentParser(prog="python -m tests.house.report", description=__doc__)
    parser.add_argument("--list", metavar="NAME", help="print the findings of rows that contain this text")
    parser.add_argument("--path", default="", help="only findings in paths that begin with this")
    args = parser.parse_args()
    rows = measures()
    for name, (value, bound, findings) in rows.items():
        if args.list is None:
            mark = "" if value <= bound else "   <-- too many"
            print(f"{name:40} {value:>8g}   at most {bound:g}{mark}")
        elif args.list in name:
            print(*(str(f) for f in findings if f.path.startswith(args.path)), sep="\n")
    return int(any(value > bound for value, bound, _ in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
