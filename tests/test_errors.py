"""The sentence about an unknown name: the nearest first, and at most ten of the valid ones."""

from __future__ import annotations

import pytest

from mhla_lightning.config.recipes import recipe_names
from mhla_lightning.errors import unknown_name


@pytest.mark.parametrize(
    ("asked", "near"),
    [
        (
            "wan_1_3b",
            [f"video_dit/wan_1_3b_{kind}_finetune" for kind in ("mhla", "hybrid", "linear")],
        ),
        ("deit_tiny_mhla_mnist", ["classification/deit_tiny_mhla_mnist_cpu"]),
        ("classification/deit_tiny_mhla_minst_cpu", ["classification/deit_tiny_mhla_mnist_cpu"]),
        ("lm_tiny_mhla_stdlib", ["language/lm_tiny_mhla_stdlib_cpu"]),
        ("xyz", []),
    ],
)
def test_the_nearest_recipes_come_first(asked: str, near: list[str]) -> None:
    reason = unknown_name("recipe", asked, recipe_names())
    hint, _, valid = reason.partition(" valid: ")
    assert [part for part in hint.split("'") if "/" in part and part != asked] == near
    listed, _, more = valid.partition(" and ")
    assert len(listed.split(", ")) == 10
    assert set(near) <= set(listed.split(", ")) <= set(recipe_names())
    assert more == f"{len(recipe_names()) - 10} more"


def test_few_names_are_all_listed() -> None:
    assert unknown_name("form", "x", ["b", "a"], of="y") == "unknown form 'x' of y; valid: a, b"
