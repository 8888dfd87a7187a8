"""Moved keys: old places work, run ids stay, and a resume sees no difference."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mhla_lightning.config import moved_keys
from mhla_lightning.config.moved_keys import MOVED, flat, moved, moved_name
from mhla_lightning.config.recipes import apply_overrides, argument
from tests.helpers.errors import refused

GOLDEN = Path(__file__).parents[1] / "golden"
FLAT = json.loads((GOLDEN / "flat_recipes.json").read_text())  # recipe.yaml of runs made then
CLASSES = [(section, name) for section, classes in MOVED.items() for name in classes]


@pytest.fixture
def new_shape(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every class of the table takes its groups."""
    monkeypatch.setattr(moved_keys, "_parameters", lambda path: frozenset())
    moved_keys._tell.cache_clear()
    yield
    moved_keys._tell.cache_clear()


def images(**arguments: Any) -> dict[str, Any]:
    return {
        "trainer": {},
        "model": {
            "class_path": "mhla_lightning.tasks.ClassificationTask",
            "init_args": {"mixup": 0.8, "num_classes": 4},
        },
        "data": {"class_path": "mhla_lightning.data.ImageDataModule", "init_args": arguments},
    }


@pytest.mark.usefixtures("new_shape")
def test_old_keys_move_and_move_back() -> None:
    old = images(path="a", num_workers=2, seed=3, batch_size=8)
    new = moved(old)
    assert new["data"]["init_args"] == {
        "path": "a",
        "batch_size": 8,
        "reading": {"num_workers": 2},
        "order": {"seed": 3},
    }
    assert new["model"]["init_args"] == {"num_classes": 4, "loss": {"mixup": 0.8}}
    assert moved(new) == new
    assert flat(new, filled=False) == old
    assert old == images(path="a", num_workers=2, seed=3, batch_size=8), "the recipe itself stays"


@pytest.mark.usefixtures("new_shape")
@pytest.mark.parametrize(("section", "name"), CLASSES, ids=[name for _, name in CLASSES])
def test_the_flat_form_has_the_old_defaults(section: str, name: str) -> None:
    package = "tasks" if section == "model" else "data"
    entry = {"class_path": f"mhla_lightning.{package}.{name}", "init_args": {"loss": None, "order": None}}
    arguments = flat({section: entry})[section]["init_args"]
    expected = {key.old: key.default for key in MOVED[section][name] if not key.added}
    assert arguments == ({"order": None} if section == "model" else {"loss": None}) | expected


@pytest.mark.usefixtures("new_shape")
@pytest.mark.parametrize("name", FLAT)
def test_resolved_recipes_survive_the_way_to_the_new_form_and_back(name: str) -> None:
    assert flat(moved(FLAT[name])) == FLAT[name]


@pytest.mark.usefixtures("new_shape")
def test_classes_outside_the_table_keep_their_keys() -> None:
    foreign = images(num_workers=2)
    foreign["data"]["class_path"] = "mine.ImageDataModule"
    foreign["model"]["class_path"] = "mhla_lightning.tasks.Other"
    assert moved(foreign) == flat(foreign) == foreign
    assert moved_name("data.num_workers", foreign) == "data.num_workers"


@pytest.mark.usefixtures("new_shape")
def test_a_key_given_twice_is_refused() -> None:
    with refused("data.num_workers"):
        moved(images(num_workers=2, reading={"num_workers": 3}))


@pytest.mark.usefixtures("new_shape")
def test_overrides_by_old_names(caplog: pytest.LogCaptureFixture) -> None:
    values = images(reading={"num_workers": 2, "remote": {"retries": 3, "timeout": 9}}, path="a")
    overrides = {
        "data.num_workers": 0,
        "data.init_args.seed": 5,
        "data.remote.retries": 1,
        "model.mixup": 0.5,
    }
    with caplog.at_level(logging.WARNING):
        result = apply_overrides(values, overrides)
    arguments = result["data"]["init_args"]
    assert arguments["reading"] == {"num_workers": 0, "remote": {"retries": 1, "timeout": 9}}
    assert arguments["order"] == {"seed": 5}
    assert result["model"]["init_args"]["loss"] == {"mixup": 0.5}
    assert argument(result, "data.num_workers") == argument(result, "data.reading.num_workers") == 0
    told = [record.getMessage() for record in caplog.records]
    assert "data.num_workers is now data.reading.num_workers; the old name works in this version" in told
    assert len(told) == len(set(told)) == 4


@pytest.mark.usefixtures("new_shape")
def test_overrides_that_change_the_class() -> None:
    tokens = "mhla_lightning.data.TokenDataModule"
    result = apply_overrides(images(path="a"), {"data.class_path": tokens, "data.val": 0.1})
    assert result["data"]["init_args"]["text"] == {"val": 0.1}
    whole = {"class_path": tokens, "init_args": {"path": "b", "num_workers": 0}}
    result = apply_overrides(images(path="a"), {"data": whole, "data.length": 64})
    assert result["data"]["init_args"] == {
        "path": "b",
        "reading": {"num_workers": 0},
        "text": {"length": 64},
    }


@pytest.mark.usefixtures("new_shape")
def test_another_path_drops_the_source_in_every_place() -> None:
    values = images(path="a")
    values["data"] = {
        "class_path": "mhla_lightning.data.ClipDataModule",
        "init_args": {"path": "a", "source": "film.mp4", "clips": {"frames": 8, "flip": 0.5}},
    }
    arguments = apply_overrides(values, {"data.path": "b"})["data"]["init_args"]
    assert arguments == {"path": "b", "source": None, "clips": {"frames": None, "flip": 0.5}}
