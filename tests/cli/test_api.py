"""The public face: names are imported when they are used, and the verbs can be called from Python."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import mhla_lightning as mhla
from mhla_lightning import api
from mhla_lightning.cli.main import main
from mhla_lightning.cli.spelling import VerbParser
from mhla_lightning.runs.folder import read_object
from tests.helpers.errors import refused
from tests.helpers.language_runs import RECIPE, write_text

FEW = {"trainer.max_steps": 2, "trainer.val_check_interval": 2}


def test_importing_the_package_imports_next_to_nothing() -> None:
    code = (
        "import sys; before = set(sys.modules); import mhla_lightning as m; new = set(sys.modules) - before;"
        "assert new <= {'mhla_lightning', 'importlib', 'importlib._abc', 'warnings', '__future__'}, new;"
        "assert set(m.__all__) <= set(dir(m)); m.UserError; assert 'torch' not in sys.modules;"
        "m.run; m.RunSummary; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("name", mhla.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert callable(getattr(mhla, name))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Tsk'"):
        mhla.Tsk  # type: ignore[attr-defined]  # noqa: B018


def test_compare_is_a_function_whatever_was_imported_before() -> None:
    code = (
        "import mhla_lightning.compare.child as child, mhla_lightning as m;"
        "assert callable(m.compare) and child.ChildRun;"
        "from mhla_lightning import compare; assert callable(compare)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(
    ("verb", "given", "own"),
    [
        ("generate", api.GenerateArguments, {"run", "prompt", "prompts", "json"}),
        ("sample", api.SampleArguments, {"run", "json"}),
        ("export", api.ExportArguments, {"run", "to", "json"}),
        ("compare", api.CompareArguments, {"recipe", "json"}),
    ],
)
def test_the_options_are_those_of_the_verb(verb: str, given: Any, own: set[str]) -> None:
    parser = VerbParser()
    importlib.import_module(f"mhla_lightning.cli.{verb}").add_arguments(parser)
    assert set(given.__annotations__) | own == set(parser.written()) - {"help"}


def test_run_resume_evaluate_and_compare(recipe: Path, tmp_path: Path) -> None:
    found = mhla.run(recipe, FEW, runs=tmp_path, run_id="one")
    assert (found.folder, found.steps) == (tmp_path / "one", 2)
    assert found.last == read_object(tmp_path / "one" / "summary.json")["last"]
    assert "val/loss" in found.best
    assert mhla.run(recipe, FEW, runs=tmp_path, run_id="one") == found  # finished before
    again = mhla.run(recipe, FEW, runs=tmp_path, run_id="one", mode="validate")
    assert again.last["val/loss"] == pytest.approx(found.last["val/loss"])
    with refused("trainer.max_step"):
        mhla.run(recipe, {"trainer.max_step": 2}, runs=tmp_path)
    written = mhla.export("one", tmp_path / "weights.safetensors", runs=tmp_path)
    assert written.path.is_file()
    assert "pos_embed" in written.tensors
    with refused("to"):
        mhla.export("one", tmp_path / "weights.safetensors", runs=tmp_path)


def test_generate_gives_what_the_verb_gives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tiny.yaml").write_text(RECIPE.replace("PATH", str(write_text(tmp_path))))
    mhla.run(tmp_path / "tiny.yaml", {**FEW, "checkpoint.every_n_steps": 2}, runs=tmp_path, run_id="text")
    capsys.readouterr()
    first, second = mhla.generate("text", ["the", "--a"], runs=tmp_path, max_new_tokens=5, greedy=True)
    assert capsys.readouterr().out == ""
    assert (first.prompt, first.tokens, first.finished) == ("the", 5, "length")
    assert second.prompt == "--a"
    words = ["generate", "text", "--runs", str(tmp_path), "--prompt", "the", "--max-new-tokens", "5"]
    assert main([*words, "--greedy"]) == 0
    assert capsys.readouterr().out == f"the{first.text}\n"
    with refused("max_new_tokens"):
        mhla.generate("text", runs=tmp_path, max_new_tokens=0)
    with refused("temprature"):
        mhla.generate("text", temprature=1.0)  # type: ignore[call-arg]
    with refused(None):
        mhla.generate("text", dtype="float31")
    with refused("run"):
        mhla.sample("nothing", runs=tmp_path)


@pytest.mark.slow
def test_compare_gives_the_table(recipe: Path, tmp_path: Path) -> None:
    table = mhla.compare(recipe, FEW, over=["model.attention=[linear]"], runs=tmp_path)
    assert [row["name"] for row in table.rows] == ["linear"]
    assert (table.folder / "curves.png").is_file()


def test_a_stopped_run_is_an_exception(recipe: Path, tmp_path: Path) -> None:
    stop = [{"class_path": "tests.helpers.stopping.StopAt", "init_args": {"step": 1}}]
    with pytest.raises(mhla.RunStopped, match="exit code 75") as stopped:
        mhla.run(recipe, {**FEW, "trainer.callbacks": stop}, runs=tmp_path, run_id="stopped")
    assert stopped.value.code == 75
