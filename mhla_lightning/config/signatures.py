"""Arguments of classes, read from their source files without importing them.

Importing torch and Lightning takes seconds. Only plain source is understood: classes, `from x import y`,
dataclasses, inheritance. Where a name or a signature cannot be read so, the answer is None, and the caller
leaves the judgement to the imported class.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class ClassSource:
    """A class as its source file defines it.

    Args:
        module: dotted name of the module with the definition.
        node: the definition.
    """

    module: str
    node: ast.ClassDef

    @property
    def is_dataclass(self) -> bool:
        """Whether `@dataclass` decorates it."""
        calls = [d.func if isinstance(d, ast.Call) else d for d in self.node.decorator_list]
        return any(ast.unparse(call).rpartition(".")[2] == "dataclass" for call in calls)


def find_class(path: str) -> ClassSource | None:
    """Find the class of a dotted path, through any re-exports."""
    module, _, name = path.rpartition(".")
    return _find(module, name)


def class_names(module: str) -> list[str] | None:
    """Return the public classes of a module; None where its source leaves them open."""
    tree = _tree(module)
    if tree is None or not _is_plain(tree):
        return None
    names = [name for name in _bindings(module) if not name.startswith("_")]
    return sorted(name for name in names if _find(module, name) is not None)


def parameters(source: ClassSource) -> dict[str, ast.expr | None] | None:
    """Return the arguments of a class and their annotations; None where they cannot be read.

    `**kwargs` that go to `super().__init__` are the base's arguments; any others cannot be read.
    """
    init = _method(source.node, "__init__")
    if init is not None:
        given = init.args
        if given.vararg is not None:
            return None
        every = [*given.posonlyargs, *given.args, *given.kwonlyargs]
        own = {argument.arg: argument.annotation for argument in every[1:]}
        if given.kwarg is None:
            return own
        passed = _passed_on(source, init, given.kwarg.arg)
        return None if passed is None else own | passed
    inherited: dict[str, ast.expr | None] = {}
    for base in _bases(source):
        found = parameters(base) if base is not None else None
        if found is None:
            return None
        inherited |= found
        if not source.is_dataclass:
            return inherited
    return inherited | _fields(source.node) if source.is_dataclass else inherited


def config_of(source: ClassSource, annotation: ast.expr | None) -> ClassSource | None:
    """Return the dataclass in an annotation `Config`, `Config | None` or `list[Config] | None`."""
    nodes = ast.walk(annotation) if annotation is not None else ()
    for name in [node.id for node in nodes if isinstance(node, ast.Name)]:
        for module in _modules(source):
            found = _find(module, name)
            if found is not None and found.is_dataclass:
                return found
    return None


def _modules(source: ClassSource) -> Iterator[str]:
    """Yield the modules of a class and of its bases, where inherited annotations stand."""
    yield source.module
    for base in _bases(source):
        if base is not None:
            yield from _modules(base)


def table_of_classes(module: str, table: str) -> dict[str, ClassSource] | None:
    """Read a registry, a dict literal of names and classes; None where it is no such."""
    tree = _tree(module)
    for statement in tree.body if tree is not None else ():
        if isinstance(statement, ast.AnnAssign | ast.Assign) and isinstance(statement.value, ast.Dict):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            if any(isinstance(target, ast.Name) and target.id == table for target in targets):
                return _classes(module, statement.value)
    return None


def _classes(module: str, literal: ast.Dict) -> dict[str, ClassSource] | None:
    found = {}
    for key, value in zip(literal.keys, literal.values, strict=True):
        source = _find(module, value.id) if isinstance(value, ast.Name) else None
        if not isinstance(key, ast.Constant) or source is None:
            return None
        found[str(key.value)] = source
    return found


def _find(module: str, name: str) -> ClassSource | None:
    bound = _bindings(module).get(name)
    if isinstance(bound, ast.ClassDef):
        return ClassSource(module, bound)
    return _find(*bound) if bound is not None else None


@cache
def _bindings(module: str) -> dict[str, ast.ClassDef | tuple[str, str]]:
    """Names of a module: its classes, and (module, name) of everything imported."""
    tree = _tree(module)
    found: dict[str, ast.ClassDef | tuple[str, str]] = {}
    for statement in _top(tree.body) if tree is not None else ():
        if isinstance(statement, ast.ClassDef):
            found[statement.name] = statement
        elif isinstance(statement, ast.ImportFrom):
            origin = _origin(module, statement)
            found |= {alias.asname or alias.name: (origin, alias.name) for alias in statement.names}
    return found


def _top(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a module, those under `if TYPE_CHECKING:` and the like included."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.If):
            yield from _top(statement.body)


def _origin(module: str, statement: ast.ImportFrom) -> str:
    if statement.level == 0:
        return statement.module or ""
    file = source_file(module)
    up = statement.level - (file is not None and file.name == "__init__.py")
    package = module.split(".")[: -up or None]
    return ".".join([*package, *([statement.module] if statement.module else [])])


def _is_plain(tree: ast.Module) -> bool:
    """Whether the source shows every name: no `import *`."""
    return not any(
        isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names)
        for node in tree.body
    )


def _method(node: ast.ClassDef, name: str) -> ast.FunctionDef | None:
    return next((s for s in node.body if isinstance(s, ast.FunctionDef) and s.name == name), None)


def _fields(node: ast.ClassDef) -> dict[str, ast.expr | None]:
    return {
        statement.target.id: statement.annotation
        for statement in node.body
        if isinstance(statement, ast.AnnAssign)
        and isinstance(statement.target, ast.Name)
        and not ast.unparse(statement.annotation).startswith("ClassVar")
    }


def _passed_on(source: ClassSource, init: ast.FunctionDef, kwargs: str) -> dict[str, ast.expr | None] | None:
    """Return the arguments of the base that `super().__init__` gets by `**kwargs`."""
    (base, *others) = _bases(source)
    theirs = parameters(base) if base is not None and not others else None
    for node in ast.walk(init):
        if not (isinstance(node, ast.Call) and ast.unparse(node.func) == "super().__init__"):
            continue
        named = {keyword.arg for keyword in node.keywords}
        passes = any(k.arg is None and ast.unparse(k.value) == kwargs for k in node.keywords)
        if theirs is not None and passes:
            left = list(theirs.items())[len(node.args) :]
            return {name: annotation for name, annotation in left if name not in named}
    return None


def _bases(source: ClassSource) -> list[ClassSource | None]:
    return [_find(source.module, b.id) if isinstance(b, ast.Name) else None for b in source.node.bases]


@cache
def _tree(module: str) -> ast.Module | None:
    file = source_file(module)
    return ast.parse(file.read_text(encoding="utf-8")) if file is not None else None


@cache
def source_file(module: str) -> Path | None:
    """Find the source file of a module without importing it or its packages."""
    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    for place in (spec.submodule_search_locations or ()) if spec is not None else ():
        base = Path(place, *rest)
        for file in (base.with_name(f"{base.name}.py"), base / "__init__.py"):
            if file.is_file() and (rest or file.name == "__init__.py"):
                return file
    return None
