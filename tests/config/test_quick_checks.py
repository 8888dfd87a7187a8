"""Mistyped names are refused before torch is imported, and valid recipes pass."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import ArgumentParser

from mhla_lightning.config.quick_checks import check_names
from mhla_lightning.config.recipes import apply_overrides, load_recipe, parse_overrides, recipe_names
from mhla_lightning.config.signatures import class_names, find_class, parameters
from tests.helpers.errors import refused

IMAGES, TEXT = "classification/deit_tiny_mhla_mnist_cpu", "language/lm_340m_mhla_fineweb_edu"


@pytest.fixture(autouse=True)
def nothing_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks take operators from their source as long as nobody has imported, and extended, them."""
    monkeypatch.delitem(sys.modules, "mhla_lightning.attention.entry", raising=False)


@pytest.mark.parametrize("name", recipe_names())
def test_packaged_recipes_pass(name: str) -> None:
    check_names(load_recipe(name).values)


MISTAKES: list[tuple[str, str, str, str]] = [  # recipe, option, value, key of the error
    (IMAGES, "--modle.attention", "mhla", "modle"),
    (IMAGES, "--trainer.max_step", "4", "trainer.max_step"),
    (IMAGES, "--trainer.logger", "true", "trainer.logger"),
    (IMAGES, "--trainer.max_steps", "0", "trainer.max_steps"),
    (IMAGES, "--model.optimiser.lr", "3", "model.optimiser"),
    (IMAGES, "--model.optimizer.rate", "3", "model.optimizer.rate"),
    (IMAGES, "--data.augmentation.flip", "1", "data.augmentation.flip"),
    (IMAGES, "--data.mix", "[{pat: a}]", "data.mix.0.pat"),
    (IMAGES, "--model.class_path", "mhla_lightning.tasks.ClassificationTsk", "model.class_path"),
    (IMAGES, "--model.class_path", "mhla_lightning.tsks.ClassificationTask", "model.class_path"),
    (
        IMAGES,
        "--trainer.callbacks",
        "[{class_path: mhla_lightning.callbacks.EMMA}]",
        "trainer.callbacks.0.class_path",
    ),
    (
        IMAGES,
        "--trainer.callbacks",
        "[{class_path: mhla_lightning.callbacks.EMA, init_args: {deca: 1}}]",
        "trainer.callbacks.0.deca",
    ),
    (IMAGES, "--model.attention", "mlha", "model.attention"),
    (IMAGES, "--model.attention", "mamba2", "model.attention"),
    (IMAGES, "--model.attention", "{name: mhla, block: 3}", "model.attention.block"),
    (IMAGES, "--model.attention", "[softmax, {name: mhla, block: 3}]", "model.attention.1.block"),
    (TEXT, "--model.attention", "{name: mhla, blocks: 3}", "model.attention.blocks"),
]


@pytest.mark.parametrize(
    ("recipe", "option", "value", "key"), MISTAKES, ids=[f"{case[1]} {case[2]}" for case in MISTAKES]
)
def test_unknown_names_are_refused_by_key(recipe: str, option: str, value: str, key: str) -> None:
    values = apply_overrides(load_recipe(recipe).values, parse_overrides([option, value]))
    with refused(key):
        check_names(values)


@pytest.mark.parametrize(
    "overrides",
    [
        {"model.attention": [{"name": "softmax"}, "mhla"]},
        {"model.attention": {"name": "mhla", "preset": "release", "blocks": 2, "gate": True}},
        {"trainer.callbacks": [{"class_path": "somebody.Callback", "init_args": {"any": 1}}]},
        {
            "model.attention": "theirs",
            "trainer.callbacks": [{"class_path": "somebody.RegistersAttention"}],
        },
    ],
    ids=["list", "options of layer and operator", "foreign class", "foreign operator"],
)
def test_names_that_may_be_right_pass(overrides: dict[str, Any]) -> None:
    check_names(apply_overrides(load_recipe(IMAGES).values, overrides))


def test_signatures_are_those_of_the_imported_classes() -> None:
    """Reading the source and asking Python give the same arguments, for every public class of ours."""
    import importlib
    import inspect

    for module in ("mhla_lightning.tasks", "mhla_lightning.data", "mhla_lightning.callbacks"):
        names = class_names(module)
        assert names == sorted(importlib.import_module(module).__all__)
        for name in names:
            source = find_class(f"{module}.{name}")
            read = parameters(source) if source is not None else None
            imported = getattr(importlib.import_module(module), name)
            names = list(inspect.signature(imported).parameters)
            if module.endswith("tasks"):  # their further arguments are the base's, which the parser finds too
                names = [added.partition(".")[0] for added in ArgumentParser().add_class_arguments(imported)]
            assert read is None or list(read) == list(dict.fromkeys(names)), name
            assert read is not None or not module.endswith("tasks")
    trainer = find_class("lightning.pytorch.Trainer")
    assert trainer is not None
    from lightning.pytorch import Trainer

    assert list(parameters(trainer) or ()) == list(inspect.signature(Trainer.__init__).parameters)[1:]


def test_a_mistyped_key_is_answered_at_once(tmp_path: Path) -> None:
    """Also without compiled bytecode: 30 s before, when torch and Lightning came first."""
    command = [sys.executable, "-m", "mhla_lightning", "run", IMAGES, "--model.optimiser.lr", "3"]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPYCACHEPREFIX": str(tmp_path)}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --model.optimiser: ")
    assert after.ru_utime - before.ru_utime < 3
