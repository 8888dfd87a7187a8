"""Keys of errors: where nested objects raise them, and how the command line writes them."""

from __future__ import annotations

import pytest

from mhla_lightning.cli.spelling import VerbParser, spelled
from mhla_lightning.errors import DataError, UserError, below, inside
from tests.helpers.errors import refused


@pytest.mark.parametrize(
    ("section", "key", "expected"),
    [
        ("model", "mixup", "model.mixup"),
        ("model.optimizer", "lr", "model.optimizer.lr"),
        ("model.optimizer", "optimizer.lr", "model.optimizer.lr"),
        ("model.loss.distill", "loss.distill.output", "model.loss.distill.output"),
        ("trainer.callbacks.0", "decay", "trainer.callbacks.0.decay"),
        ("data", "data.mix", "data.mix"),
    ],
)
def test_keys_are_placed_below_a_section(section: str, key: str, expected: str) -> None:
    assert below(section, key) == expected


def test_sections_nest_and_files_stay() -> None:
    with refused("model.attention.blocks"), inside("model"), inside("attention"):
        raise UserError("blocks", "3 does not fit")
    with refused("train/index.json", DataError), inside("data"):
        raise DataError("train/index.json", "it is missing")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (UserError("run_id", "it is bad"), "--run-id: it is bad"),
        (UserError("recipe", "it is bad"), "RECIPE: it is bad"),
        (UserError("model.lr", "see `data.path` and `run_id`"), "--model.lr: see --data.path and --run-id"),
        (UserError("runs/model.yaml", "it is bad"), "runs/model.yaml: it is bad"),
        (DataError("data.tar", "it is cut"), "data.tar: it is cut"),
        (UserError(None, "it is bad"), "it is bad"),
    ],
    ids=str,
)
def test_the_command_line_spells_keys(error: UserError, expected: str) -> None:
    parser = VerbParser()
    parser.add_argument("recipe", metavar="RECIPE")
    parser.add_argument("--run-id")
    assert spelled(error, parser, takes_overrides=True) == expected
