"""Packaged recipes: what each resolves to, and the run ids that runs of earlier versions have."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from mhla_lightning.attention import MHLA, Attention
from mhla_lightning.attention.mhla import CausalMHLA
from mhla_lightning.config.recipes import RECIPES, load_recipe, recipe_names
from mhla_lightning.config.resolve import Resolved, differences, resolve
from mhla_lightning.runs.folder import default_run_id

GOLDEN = Path(__file__).parents[1] / "golden"
RUN_IDS = json.loads((GOLDEN / "run_ids.json").read_text())  # of the recipes before keys moved
FLAT = json.loads((GOLDEN / "flat_recipes.json").read_text())  # recipe.yaml of runs made then


@cache
def recipe_resolved(name: str) -> Resolved:
    """Resolving a recipe takes a second, and each is read by several tests."""
    return resolve(load_recipe(name).values)


@pytest.mark.parametrize("name", recipe_names())
def test_default_run_ids_stay(name: str) -> None:
    resolved = recipe_resolved(name)
    assert default_run_id(load_recipe(name).name, resolved.identity()) == RUN_IDS[name]
    if name in FLAT:
        assert differences(FLAT[name], resolved.values) == ""
        again = resolve({**FLAT[name], "trainer": {}}).identity()
        assert (again["model"], again["data"]) == (resolved.identity()["model"], resolved.identity()["data"])


def test_every_packaged_recipe_has_a_golden_run_id() -> None:
    assert sorted(RUN_IDS) == recipe_names()


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_resolves_and_names_only_allowed_classes(name: str) -> None:
    text = (RECIPES / f"{name}.yaml").read_text()
    assert all(
        path.startswith(("mhla_lightning.", "lightning.", "torch."))
        for path in re.findall(r"class_path: (\S+)", text)
    )
    uncommented = [
        line
        for line in text.splitlines()
        if "#" not in line and not line.rstrip().endswith((":", "Task", "Module"))
    ]
    assert uncommented == []
    resolved = recipe_resolved(name)
    assert resolved.task.grid
    modules = list(_plan(resolved.task).modules())
    operators = [m for m in modules if isinstance(m, Attention)]
    assert operators or resolved.task.attention == "none"
    assert any(isinstance(m, (MHLA, CausalMHLA)) for m in operators) == (
        "_mhla_" in name or "_hybrid_" in name
    )
    if not name.endswith("_m64"):  # a row of the paper's
        assert all(m.grid.num_blocks**2 <= m.grid.tokens for m in operators if isinstance(m, MHLA))
    for m in operators:
        if isinstance(m, CausalMHLA):
            assert m.mixing.blocks * m.chunk_size >= resolved.task.grid[0]


def _plan(task: Any) -> torch.nn.Module:
    with torch.device("meta"):
        return task._build()
