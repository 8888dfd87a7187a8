"""The recipe of a run outlives damage to its file: each checkpoint holds a copy."""

from __future__ import annotations

from pathlib import Path

import pytest

from mhla_lightning.config.recipes import read_run_recipe
from mhla_lightning.runs.folder import RunFolder
from tests.helpers.errors import refused
from tests.helpers.written_files import DAMAGES, damage

TEXT = (
    "model:\n  class_path: a.B\ndata:\n  class_path: c.D\ncheckpoint:\n  every_n_steps: 5\n  keep_last: 1\n"
)
VALUES = {
    "model": {"class_path": "a.B"},
    "data": {"class_path": "c.D"},
    "checkpoint": {"every_n_steps": 5, "keep_last": 1},
}


def run_with(root: Path, copies: int) -> RunFolder:
    run = RunFolder(root)
    run.recipe.write_text(TEXT)
    for step in range(1, copies + 1):
        folder = run.checkpoints / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "recipe.yaml").write_text(TEXT)
        (folder / "COMPLETE").touch()
    return run


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("copies", [1, 2])
def test_a_damaged_recipe_is_read_from_a_checkpoint(tmp_path: Path, how: str, copies: int) -> None:
    run = run_with(tmp_path, copies)
    damage(run.recipe, how)
    if copies == 2:
        damage(run.checkpoints / "step-00000002" / "recipe.yaml", how)
    assert read_run_recipe(run) == VALUES


@pytest.mark.parametrize("end", range(1, len(TEXT)))
def test_a_recipe_cut_anywhere(tmp_path: Path, end: int) -> None:
    """Also where the rest is YAML that lacks the last keys."""
    run = run_with(tmp_path, 1)
    run.recipe.write_text(TEXT[:end])
    assert read_run_recipe(run) == VALUES


def test_a_recipe_that_a_person_edited(tmp_path: Path) -> None:
    run = run_with(tmp_path, 0)
    run.recipe.write_text(TEXT.rstrip())
    assert read_run_recipe(run) == VALUES
    run.recipe.write_text(TEXT.replace("5", "7"))
    assert read_run_recipe(run)["checkpoint"]["every_n_steps"] == 7


def test_a_damaged_recipe_without_a_copy(tmp_path: Path) -> None:
    run = run_with(tmp_path, 0)
    for text in ("", "model: {", "model: 1\n", "- a\n"):
        run.recipe.write_text(text)
        with refused(str(run.recipe)):
            read_run_recipe(run)
