"""Names: private ones of other libraries, names with two meanings, parameters, protocols by strings."""

from __future__ import annotations

import ast
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping

from tests.house.source import PACKAGE, Finding, dotted, nodes, package_trees

PARAMETERS = 10
_PUBLIC = ("_", "_asdict", "_exit", "_fields", "_replace", "_typeshed")  # documented by Python
_SETTINGS = ("torch.backends.", "torch._dynamo.config.", "sys.", "os.", "threading.excepthook")
"""Names that their libraries mean to be set."""
_FLAT = ("triton.jit",)
"""Decorators of functions whose parameters cannot be gathered in a dataclass."""
_OBJECTS = re.compile(r"strategy|trainer|task\b|module\b|callback\b|operator\b|backbone\b|teacher\b")

Trees = Mapping[str, ast.Module]


def private_uses(trees: Trees | None = None) -> list[Finding]:
    """Return the uses of private or patched names of other libraries.

    A use is one line that imports an underscored name, reads it as an attribute, asks for it by `getattr`,
    overrides it in a subclass, or sets an attribute of another library's module or class.

    Args:
        trees: parsed files by path; None takes those of the package.
    """
    trees = package_trees() if trees is None else trees
    ours = {path: _own_private_names(tree) for path, tree in trees.items()}
    inherited = set().union(*ours.values())
    used = Counter(name for tree in trees.values() for name in _mentioned(tree))
    found = []
    for path, tree in trees.items():
        libraries = _libraries(tree)
        for node in nodes(tree):
            if isinstance(node, ast.Attribute) and _is_private(node.attr):
                own = inherited if _is_self(node.value) else ours[path]
                if node.attr not in own or _is_foreign(node.value, libraries):
                    found.append(Finding(path, node.lineno, f".{node.attr}"))
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                found += _private_imports(path, node)
            elif isinstance(node, ast.Call):
                found += _private_by_string(path, node, ours[path], libraries)
            elif isinstance(node, ast.ClassDef):
                found += _overridden(path, node, libraries, used)
            elif isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Delete)):
                found += _patched(path, node, libraries)
    return sorted(set(found), key=lambda f: (f.path, f.line, f.text))


def _libraries(tree: ast.Module) -> dict[str, str]:
    """Return the names that a file imports from other libraries, and where they come from."""
    names: dict[str, str] = {}
    for node in nodes(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                bound = alias.asname or alias.name.split(".")[0]
                names[bound] = alias.name if alias.asname else bound
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return {name: origin for name, origin in names.items() if origin.split(".")[0] != PACKAGE}


def _is_self(node: ast.expr) -> bool:
    return dotted(node) in ("self", "cls", "super()")


def _is_foreign(node: ast.expr, libraries: Mapping[str, str]) -> bool:
    """Whether a dotted name begins with another library."""
    name = dotted(node)
    return "(" not in name and name.split(".")[0] in libraries


def _private_imports(path: str, node: ast.Import | ast.ImportFrom) -> list[Finding]:
    module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
    if module.split(".")[0] == PACKAGE or (isinstance(node, ast.ImportFrom) and node.level):
        return []
    names = [part for name in node.names for part in name.name.split(".")]
    return [
        Finding(path, node.lineno, f"import {module}: {name}")
        for name in (*module.split("."), *names)
        if _is_private(name)
    ]


def _private_by_string(
    path: str, node: ast.Call, ours: set[str], libraries: Mapping[str, str]
) -> list[Finding]:
    """`getattr(x, "_name")`, `setattr(module, "name", value)` and attrgetter("a._name")."""
    function = dotted(node.func) or ast.unparse(node.func)
    strings = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    found = []
    by_name = function in ("getattr", "setattr", "hasattr", "delattr") and len(node.args) > 1
    if by_name or "getter" in function:
        names = {part for text in strings for part in text.split(".")}
        found = [name for name in names if _is_private(name) and name not in ours]
        if by_name and function in ("setattr", "delattr") and _is_foreign(node.args[0], libraries):
            found.append(ast.unparse(node.args[0]))
    return [Finding(path, node.lineno, f"{function} '{name}'") for name in found]


def _overridden(
    path: str, node: ast.ClassDef, libraries: Mapping[str, str], used: Counter[str]
) -> list[Finding]:
    """Private methods of a subclass that nothing here calls, or that call super(): hooks of its base."""
    if not any(_is_foreign(base, libraries) for base in node.bases):
        return []
    found = []
    for method in node.body:
        if isinstance(method, (ast.FunctionDef, ast.AsyncFunctionDef)) and _is_private(method.name):
            calls_base = f"super().{method.name}(" in ast.unparse(method)
            marked = any("override" in ast.unparse(d) for d in method.decorator_list)
            if calls_base or marked or not used[method.name]:
                found.append(Finding(path, method.lineno, f"overrides {method.name}"))
    return found


def _patched(path: str, node: ast.stmt, libraries: Mapping[str, str]) -> list[Finding]:
    """Attributes of an imported module or class that are set or deleted."""
    targets = getattr(node, "targets", None) or [node.target]  # type: ignore[attr-defined]
    found = []
    for target in targets:
        if isinstance(target, ast.Attribute) and _is_foreign(target.value, libraries):
            first, _, rest = ast.unparse(target).partition(".")
            name = f"{libraries[first]}.{rest}"
            if not name.startswith(_SETTINGS) or name.split(".")[0] not in (
                "sys",
                "os",
                "torch",
                "threading",
            ):
                found.append(Finding(path, node.lineno, f"sets {name}"))
    return found


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in _PUBLIC


def _mentioned(tree: ast.Module) -> Iterator[str]:
    """Yield every private name that is read, called or named in a string."""
    for node in nodes(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            yield node.attr
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            yield node.id
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def _own_private_names(tree: ast.Module) -> set[str]:
    """Return the private names that a file defines: functions, classes, variables, attributes of self."""
    names: set[str] = set()
    for node in nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            names.add(node.name)
            names |= {a.arg for a in (*node.args.args, *node.args.kwonlyargs)}
        elif isinstance(node, ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node.value):
            names.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE:
            names |= {alias.name for alias in node.names}
    return {name for name in names if _is_private(name)}


def parameters(trees: Trees | None = None) -> list[Finding]:
    """Return the functions of more than 10 parameters, self not counted."""
    return [f for f in parameter_counts(trees) if int(f.text.split()[0]) > PARAMETERS]


def parameter_counts(trees: Trees | None = None) -> list[Finding]:
    """Return every function with its number of parameters, the number first.

    Triton kernels are passed over: they take tensors, strides and plain numbers only.
    """
    found = []
    for path, tree in (package_trees() if trees is None else trees).items():
        for node in nodes(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                if any(dotted(decorator) in _FLAT for decorator in node.decorator_list):
                    continue
                arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
                count = sum(a.arg not in ("self", "cls") for a in arguments)
                found.append(Finding(path, node.lineno, f"{count} parameters: {node.name}"))
    return found


def homonyms(trees: Trees | None = None) -> list[Finding]:
    """Return the class names that more than one class of the package has."""
    places: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for path, tree in (package_trees() if trees is None else trees).items():
        for node in nodes(tree):
            if isinstance(node, ast.ClassDef):
                places[node.name].append((path, node.lineno))
    return [
        Finding(where[0][0], where[0][1], f"class {name} also in {', '.join(p for p, _ in where[1:])}")
        for name, where in sorted(places.items())
        if len(where) > 1
    ]


def by_string(trees: Trees | None = None) -> list[Finding]:
    """Return protocols by strings on strategies, trainers, tasks, modules and callbacks.

    A finding is `getattr` or `hasattr` with a literal name, or a callback that sets a value on the task.
    """
    found = []
    for path, tree in (package_trees() if trees is None else trees).items():
        for node in nodes(tree):
            if isinstance(node, ast.Call) and dotted(node.func) in ("getattr", "hasattr", "setattr"):
                literal = len(node.args) > 1 and isinstance(node.args[1], ast.Constant)
                if literal and _OBJECTS.search(ast.unparse(node.args[0])):
                    found.append(Finding(path, node.lineno, ast.unparse(node)))
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                sets = path.startswith("callbacks/") and dotted(node.value) == "pl_module"
                found += [Finding(path, node.lineno, f"sets {ast.unparse(node)}")] * sets
    return found
