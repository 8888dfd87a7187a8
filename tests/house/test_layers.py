"""Imports run down the layers alone, without rings, at the top of a file or inside a function."""

from __future__ import annotations

import ast
from collections.abc import Collection

import pytest

from tests.house.layers import LAYERS, Import, foreign_imports, imports, rings, room_of, upward
from tests.house.source import package_files, package_trees, tracked, tree_of

# folder -> the libraries that it may import; fla is asked for by name where its operators are built, and the
# kernels' folder is imported where a call takes them
ALONE: dict[str, Collection[str]] = {
    "mhla_lightning/attention/": {"torch", "fla", "triton"},
    "cluster/": {"jinja2", "jsonargparse", "yaml"},
}
# folder -> libraries that it must not import
WITHOUT: dict[str, Collection[str]] = {
    "mhla_lightning/backbones/": {"lightning", "deepspeed"},
}
TASKS_WITHOUT = ("data", "callbacks", "strategies", "checkpoints")


@pytest.fixture(scope="module")
def edges() -> list[Import]:
    return imports()


def planted(path: str, code: str) -> list[Import]:
    """The imports of one more file, beside the package."""
    edges = imports({**package_trees(), path: ast.parse(code)})
    return [edge for edge in edges if edge.path == path]


def test_no_import_runs_up_a_layer(edges: list[Import]) -> None:
    found = upward(edges)
    assert not found, "\n".join(map(str, found))


def test_no_ring_of_rooms_folders_or_modules(edges: list[Import]) -> None:
    found = rings(edges)
    assert not found, "\n".join(" <-> ".join(ring) for ring in found)


def test_every_room_has_one_layer(edges: list[Import]) -> None:
    listed = [room for rooms in LAYERS for room in rooms]
    assert len(listed) == len(set(listed))
    assert {room_of(edge.source) for edge in edges} - {""} <= set(listed)


@pytest.mark.parametrize(
    "code",
    [
        "from mhla_lightning.cli.main import main",
        "def late():\n    from mhla_lightning.cli.main import main",
        "def late():\n    import mhla_lightning.cli.main",
        "from ..cli import main",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from mhla_lightning.cli.main import main",
        "import importlib\ndef late():\n    importlib.import_module('mhla_lightning.cli.main')",
    ],
    ids=["top", "function", "plain", "relative", "type checkers", "by name"],
)
def test_a_planted_import_of_a_higher_layer_is_found(code: str) -> None:
    path = "mhla_lightning/attention/planted.py"
    (found,) = upward(planted(path, code))
    line = next(n for n, text in enumerate(code.splitlines(), 1) if "cli" in text)
    assert str(found).startswith(f"{path}:{line} attention imports mhla_lightning.cli.main")


def test_a_planted_import_beside_its_layer_is_found() -> None:
    (found,) = upward(planted("mhla_lightning/data/planted.py", "import mhla_lightning.attention.base"))
    assert "data imports mhla_lightning.attention.base" in str(found)


def test_a_planted_room_without_a_layer_is_found() -> None:
    (found,) = upward(planted("mhla_lightning/attic/old.py", "import mhla_lightning.errors"))
    assert "room 'attic' has no layer" in str(found)


@pytest.mark.parametrize(
    ("path", "code", "ring"),
    [
        (
            "mhla_lightning/errors.py",
            "def late():\n    import mhla_lightning.cli.main",
            ["mhla_lightning.cli", "mhla_lightning.errors"],
        ),
        (
            "mhla_lightning/attention/norm.py",
            "def late():\n    from mhla_lightning.attention.layers.outputs import attention_outputs",
            ["mhla_lightning.attention.layers", "mhla_lightning.attention.norm"],
        ),
        (
            "mhla_lightning/randomness.py",
            "import mhla_lightning.planted_two",
            ["mhla_lightning.planted_two", "mhla_lightning.randomness"],
        ),
    ],
    ids=["rooms", "folders of a room", "modules"],
)
def test_a_planted_ring_is_found(path: str, code: str, ring: list[str]) -> None:
    other = {"mhla_lightning/planted_two.py": ast.parse("import mhla_lightning.randomness")}
    found = rings(imports({**package_trees(), **other, path: ast.parse(code)}))
    assert any(set(ring) <= set(one) for one in found), found


@pytest.mark.parametrize("folder", ALONE)
def test_some_rooms_import_few_libraries(folder: str) -> None:
    for path in (name for name in package_files() if name.startswith(folder)):
        for line, library in foreign_imports(path):
            assert library in ALONE[folder], f"{path}:{line} imports {library}"


@pytest.mark.parametrize("folder", WITHOUT)
def test_some_rooms_import_no_lightning(folder: str) -> None:
    for path in (name for name in package_files() if name.startswith(folder)):
        for line, library in foreign_imports(path):
            assert library not in WITHOUT[folder], f"{path}:{line} imports {library}"


def test_tasks_know_no_data_callbacks_strategies_or_checkpoints(edges: list[Import]) -> None:
    found = [
        f"{edge.path}:{edge.line} imports {edge.target}"
        for edge in edges
        if room_of(edge.source) == "tasks" and room_of(edge.target) in TASKS_WITHOUT
    ]
    assert not found, "\n".join(found)


def shared_by_tests(tree: ast.Module) -> list[tuple[int, str]]:
    """Line and name of every test module or conftest that a test imports."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module or ''}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".") if name.startswith("tests.") else []
            if any(part == "conftest" or (part.startswith("test_") and part.islower()) for part in parts):
                found.append((node.lineno, name))
    return found


def test_no_test_imports_another_test_or_a_conftest() -> None:
    """Code that tests share is in tests/helpers."""
    found = [
        f"{path}:{line} imports {name}"
        for path in tracked()
        if path.startswith("tests/")
        for line, name in shared_by_tests(tree_of(path))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "code",
    [
        "from tests.conftest import TINY_RECIPE",
        "def late():\n    import tests.training.test_resume as resume",
        "from tests.training import test_resume",
    ],
)
def test_a_planted_import_of_a_test_is_found(code: str) -> None:
    assert len(shared_by_tests(ast.parse(code))) == 1
