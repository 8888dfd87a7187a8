"""The flat copy of a model's code that an exported folder holds."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from mhla_lightning.conversion.formats.bundle import bundle


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    return bundle("mhla_lightning.integrations.transformers", "modeling_mhla")


def test_nothing_but_torch_and_transformers_is_imported(files: dict[str, bytes]) -> None:
    allowed = {*sys.stdlib_module_names, "torch", "transformers", "triton"}
    for name, content in files.items():
        for node in ast.walk(ast.parse(content)):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed, name
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert (node.module or "").split(".")[0] in allowed, name
            elif isinstance(node, ast.ImportFrom) and node.module:
                assert f"{node.module}.py" in files, name


@pytest.mark.slow
def test_every_file_is_imported_without_this_package(files: dict[str, bytes], tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("triton")
    folder = tmp_path / "copied"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    modules = sorted(name.removesuffix(".py") for name in files)
    code = (
        "import importlib, sys; sys.modules['mhla_lightning'] = None; "
        f"[importlib.import_module('copied.' + name) for name in {modules}]"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
