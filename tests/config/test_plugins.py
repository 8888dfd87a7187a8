"""Code of users: `imports` in a recipe, installed plugins, and what `mhla doctor` says of them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from mhla_lightning.attention import ATTENTION, build_attention
from mhla_lightning.backbones import BACKBONES, build_backbone
from mhla_lightning.cli.doctor import installation
from mhla_lightning.cli.main import main
from mhla_lightning.config.quick_checks import check_names
from mhla_lightning.errors import UserError
from mhla_lightning.inference.rebuilding import rebuild
from mhla_lightning.plugins import load_plugins, plugins
from mhla_lightning.runs.folder import RunFolder
from mhla_lightning.tasks import ClassificationTask
from tests.helpers.errors import refused
from tests.helpers.images import TINY_RECIPE

EXAMPLES = Path(__file__).parents[2] / "examples"
PLUGIN = """
from mhla_lightning.attention import Linear, register_attention
from mhla_lightning.backbones import BACKBONES, register_backbone
register_attention("brought", type("Brought", (Linear,), {}))
register_backbone("brought_vit", BACKBONES["deit_tiny"])
"""


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Registries and modules as they were, whatever a test registers."""
    tables: tuple[dict[str, Any], ...] = (ATTENTION, BACKBONES)
    modules = set(sys.modules)
    before = [dict(table) for table in tables]
    yield
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)
    for name in set(sys.modules) - modules:
        if name in ("power_operator", "brought_plugin", "broken_plugin"):
            del sys.modules[name]


def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, module: str) -> None:
    """A distribution with one entry point, as pip would leave it."""
    (tmp_path / f"{module}.py").write_text(code)
    info = tmp_path / f"{module}-1.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module.replace('_', '-')}\nVersion: 1.5\n")
    (info / "entry_points.txt").write_text(f"[mhla_lightning.plugins]\nmine = {module}\n")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("clean")
def test_a_recipe_names_code_of_the_user_and_trains_and_is_rebuilt(
    tmp_path: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "run",
        str(recipe),
        "--runs",
        str(tmp_path),
        "--run-id",
        "own",
        "--model.attention",
        "power",
    ]
    few = ["--trainer.max_steps", "2", "--trainer.val_check_interval", "2"]
    words += [*few, "--imports", "[power_operator]"]
    assert main(words) == 2
    assert "--imports.0: 'power_operator' cannot be imported" in capsys.readouterr().err
    before = list(sys.path)
    monkeypatch.syspath_prepend(EXAMPLES)
    assert main(words) == 0
    assert sys.path == [str(EXAMPLES), *before]
    run = RunFolder(tmp_path / "own")
    assert yaml.safe_load(run.recipe.read_text())["imports"] == ["power_operator"]
    built = rebuild(run, ClassificationTask, "a test needs a classifier")
    built.task.configure_model()
    assert "power_operator.Power" in {
        f"{type(m).__module__}.{type(m).__name__}" for m in built.task.modules()
    }
    assert main(words) == 0  # the same command finds the finished run
    assert "is finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    "value", ["power_operator", [3], ["a b"], ["os.system()"], [""], {"a": 1}, ["/tmp/x.py"]]
)
def test_what_is_no_list_of_modules_is_refused(value: object) -> None:
    with refused("imports"):
        check_names(
            {
                **yaml.safe_load(TINY_RECIPE),
                "imports": value,
                "model": {
                    "class_path": "mhla_lightning.tasks.ClassificationTask",
                    "init_args": {"attention": "mhla"},
                },
            }
        )


@pytest.mark.usefixtures("clean")
def test_an_installed_plugin_is_found_by_every_door(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert installation.plugins().detail.startswith("none installed")
    install(tmp_path, monkeypatch, PLUGIN, "brought_plugin")
    assert [(one.name, one.module, one.package) for one in plugins()] == [
        ("mine", "brought_plugin", "brought-plugin 1.5")
    ]
    assert "brought_plugin" not in sys.modules  # listing imports nothing
    found = installation.plugins()
    assert found.status == "ok"
    assert "mine (brought_plugin, brought-plugin 1.5)" in found.detail
    assert "they add attention 'brought', backbone 'brought_vit'" in found.detail
    for table in (ATTENTION, BACKBONES):
        table.pop(next(reversed(table)))
    del sys.modules["brought_plugin"]
    assert type(build_attention("brought", heads=2, dim_k=4, dim_v=4)).__name__ == "Brought"
    assert build_backbone("brought_vit", attention="brought") is not None


@pytest.mark.usefixtures("clean")
def test_a_broken_plugin_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, "import no_such_module", "broken_plugin")
    with pytest.raises(UserError, match=r"plugin 'mine' of broken-plugin 1\.5: .*uninstall"):
        load_plugins()
    assert installation.plugins().status == "fail"
