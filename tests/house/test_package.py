"""The wheel: one package with every tracked file, and no compromised dependency."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TRACKED_FOLDERS = ("mhla_lightning", "callbacks", "recipes", "cluster")


def tracked() -> list[Path]:
    out = subprocess.run(
        ["git", "ls-files", *TRACKED_FOLDERS], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    return [
        Path(line) for line in out.splitlines() if not (ROOT / line).is_symlink() and (ROOT / line).is_file()
    ]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: a build leaves a folder behind that the next one would pick up."""
    target = tmp_path_factory.mktemp("wheel")
    source = target / "source"
    shutil.copytree(
        ROOT,
        source,
        symlinks=True,
        ignore=shutil.ignore_patterns(
            ".venv", ".git", "runs-*", "build", "dist", "*.egg-info", "__pycache__"
        ),
    )
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(target),
        str(source),
    ]
    subprocess.run(command, check=True, capture_output=True)
    (built,) = target.glob("*.whl")
    return built


def test_the_wheel_holds_one_package_with_every_tracked_file(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {"mhla_lightning"}
    expected = {
        str(path) if path.parts[0] == "mhla_lightning" else f"mhla_lightning/{path}" for path in tracked()
    }
    assert expected - set(names) == set()


def test_compromised_lightning_releases_are_excluded() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for name in ("lightning", "pytorch-lightning"):
        (line,) = [d for d in project["dependencies"] if d.startswith((f"{name}>", f"{name}="))]
        assert "!=2.6.2" in line
        assert "!=2.6.3" in line
        assert ">=2.6.6" in line


def process_wide(tree: ast.Module) -> list[int]:
    """Return the lines that change, on import, what belongs to the whole process.

    A module's own class is its own: Python documents `sys.modules[__name__].__class__ = ...` for that.
    """
    owners = {"sys", "os", "warnings", "torch", "multiprocessing", "logging", "signal", "random", "locale"}
    lines = []
    for node in tree.body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            changed: list[ast.expr] = [node.value.func]
        elif isinstance(node, ast.Assign):
            changed = [target for target in node.targets if not isinstance(target, ast.Name)]
        elif isinstance(node, ast.AugAssign | ast.Delete):
            changed = node.targets if isinstance(node, ast.Delete) else [node.target]
        else:
            continue
        texts = [ast.unparse(target) for target in changed]
        shared = [text for text in texts if text != "sys.modules[__name__].__class__"]
        if any(text.split(".")[0].split("[")[0] in owners for text in shared):
            lines.append(node.lineno)
    return lines


def test_an_import_changes_nothing_of_the_process() -> None:
    """`import` in a user's script leaves the module path, the environment and the random state alone."""
    planted = (
        "import os, sys\nsys.path.pop(0)\nos.environ['A'] = '1'\ndel sys.modules['a']\nx = os.getcwd()\n"
        "sys.modules[__name__].__class__ = x\nsys.modules['a'].__class__ = x\nsys.modules[__name__] = x\n"
    )
    assert process_wide(ast.parse(planted)) == [2, 3, 4, 7, 8]
    found = [
        f"{file}:{line}"
        for file in tracked()
        if file.suffix == ".py" and file.name != "__main__.py"
        for line in process_wide(ast.parse((ROOT / file).read_text(encoding="utf-8")))
    ]
    assert found == []
