"""The rows, names, statistics and curves of a comparison, without training anything."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import pytest

from mhla_lightning.attention import CausalSelfAttention
from mhla_lightning.backbones import build_backbone
from mhla_lightning.compare.comparison import (
    best_rows,
    cost,
    headline,
    score,
    score_tags,
    spread,
    table_row,
    validation_tags,
)
from mhla_lightning.compare.curves import curves_figure, finite, mean_curve, smooth, smoothing_width
from mhla_lightning.compare.variants import (
    VariantRow,
    arguments,
    describe,
    identity,
    merged,
    rows_from_file,
    rows_over,
    seed_list,
    slug,
)
from mhla_lightning.config.recipes import (
    apply_overrides,
    load_recipe,
    parse_overrides,
    recipe_names,
    variants_file,
)
from mhla_lightning.config.resolve import resolve
from mhla_lightning.errors import UserError
from mhla_lightning.evaluation import EVALUATIONS, register_evaluation, requested_evaluation
from mhla_lightning.evaluation.tags import higher_is_better
from mhla_lightning.runs.folder import check_run_id
from tests.helpers.errors import refused

# rows


def names(rows: list[VariantRow]) -> list[str]:
    return [row.name for row in rows]


def test_over_makes_a_row_for_each_value() -> None:
    rows = rows_over(["model.attention=[linear, {name: mhla, mix_init: uniform}, [softmax, mhla]]"])
    assert names(rows) == ["linear", "mhla mix_init=uniform", "attention=[softmax, mhla]"]
    assert [row.slug for row in rows] == ["linear", "mhla-mix_init-uniform", "attention-softmax-mhla"]
    assert rows[1].overrides == {"model.attention": {"name": "mhla", "mix_init": "uniform"}}


def test_the_bare_name_of_the_recipes_operator_is_the_recipes_entry() -> None:
    own = {"name": "mhla", "blocks": 2}
    rows = rows_over(["model.attention=[linear, mhla, {name: mhla}]"], own)
    assert names(rows) == ["linear", "mhla", "mhla (2)"]
    assert [row.overrides["model.attention"] for row in rows] == ["linear", own, {"name": "mhla"}]
    assert rows_over(["model.backbone=[mhla]"], own)[0].overrides == {"model.backbone": "mhla"}


def test_several_over_multiply_and_the_first_changes_slowest() -> None:
    rows = rows_over(["model.attention=[linear, mhla]", "model.optimizer.lr=[1e-3, 1e-4]"])
    assert names(rows) == ["linear, lr=0.001", "linear, lr=0.0001", "mhla, lr=0.001", "mhla, lr=0.0001"]
    assert rows[3].overrides == {"model.attention": "mhla", "model.optimizer.lr": 1e-4}


def test_rows_that_read_alike_get_a_number() -> None:
    rows = rows_over(["model.attention=[mhla, {name: mhla}, MHLA]"])
    assert names(rows) == ["mhla", "mhla (2)", "MHLA (3)"]
    assert len({row.slug.lower() for row in rows}) == 3


def test_values_that_only_python_takes_for_equal_are_two_rows() -> None:
    assert names(rows_over(["model.x=[1, true, 1.0]"])) == ["x=1", "x=true", "x=1.0"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("mhla", "mhla"),
        ("", 'attention=""'),
        (None, "attention=null"),
        (False, "attention=false"),
        (8, "attention=8"),
        ([], "attention=[]"),
        ({}, "attention=()"),
        ({"name": "mhla"}, "mhla"),
        ({"heads": 2, "gate": True}, "heads=2 gate=true"),
        ({"name": "mhla", "mix_init_options": {"sigma": 2}}, "mhla mix_init_options=(sigma=2)"),
        ({"class_path": "mhla_lightning.callbacks.EMA", "init_args": {"decay": 0.9}}, "EMA decay=0.9"),
    ],
)
def test_describe(value: Any, text: str) -> None:
    assert describe("model.attention", value) == text


@pytest.mark.parametrize(
    "given",
    [
        ["model.attention"],
        ["=[a]"],
        ["model.attention=mhla"],
        ["model.attention=[]"],
        ["model.attention="],
        ["model.attention=[a"],
        ["model.attention=[a, b, a]"],
        ["x=[1]", "x=[2]"],
    ],
    ids=str,
)
def test_over_refuses(given: list[str]) -> None:
    with refused("over"):
        rows_over(given)


def test_variants_file(tmp_path: Path) -> None:
    file = tmp_path / "variants.yaml"
    file.write_text("base:\nsmall lr: {model.optimizer.lr: 1e-4}\n2: {model.attention: linear}\n")
    rows = rows_from_file(file)
    assert names(rows) == ["base", "small lr", "2"]
    assert [row.overrides for row in rows] == [
        {},
        {"model.optimizer.lr": 1e-4},
        {"model.attention": "linear"},
    ]


@pytest.mark.parametrize(
    "text",
    ["", "[a, b]", "a: {", "a: {x: 1}\nb: {x: 2}\na: {x: 3}", "a: linear"],
    ids=["nothing", "a list", "no YAML", "a key twice", "a row that is no mapping"],
)
def test_variants_file_refuses(text: str, tmp_path: Path) -> None:
    (tmp_path / "variants.yaml").write_text(text)
    with pytest.raises(UserError, match="variants.yaml"):
        rows_from_file(tmp_path / "variants.yaml")


@pytest.mark.slow  # resolves 26 recipes
def test_packaged_rows_of_text_fit_their_recipe() -> None:
    rows = rows_from_file(variants_file("language_quality"))
    assert len(rows) == 26
    assert len({str(row.overrides["model.attention"]) for row in rows}) == 26
    attentions = {row.name: row.overrides["model.attention"] for row in rows}
    for row in rows:
        resolve(apply_overrides(load_recipe("language/lm_tiny_mhla_stdlib_cpu").values, row.overrides))
        if not row.name.endswith(", conv"):
            assert attentions[f"{row.name}, conv"] == attentions[row.name] | {"short_conv": 4}


def test_packaged_rows_of_recall_differ_in_the_operator_alone() -> None:
    """The same layer, convolution and training, and parameters within 1 %."""
    rows = rows_from_file(variants_file("language_recall"))
    assert {row.name for row in rows} >= {"softmax", "deltanet", "linear", "mhla local"}
    assert 4 < len(rows) <= 8
    layers, rest, parameters = set(), set(), []
    for row in rows:
        values = apply_overrides(load_recipe("language/lm_tiny_mhla_mqar_cpu").values, row.overrides)
        attention = values["model"]["init_args"]["attention"]
        layers.add(str({key: attention.get(key) for key in CausalSelfAttention.layer_options()}))
        others = {key: value for key, value in row.overrides.items() if key != "model.attention"}
        rest.add(str({**others, "model.optimizer.lr": None}))
        model = build_backbone(
            "lm_tiny", attention=attention, **values["model"]["init_args"]["backbone_options"]
        )
        parameters.append(sum(one.numel() for one in model.parameters()))
    assert len(layers) == len(rest) == 1
    assert "'short_conv': 4" in layers.pop()
    assert max(parameters) <= 1.01 * min(parameters)


def test_packaged_rows_of_videos_fit_their_recipe() -> None:
    """At the size that the file's own command names: 2,048 tokens."""
    rows = rows_from_file(variants_file("video_quality"))
    assert [row.name for row in rows] == ["softmax", "linear", "mhla", "hybrid"]
    for row in rows:
        given = {
            "model.backbone_options.input_size": [16, 64, 64],
            "model.backbone_options.depth": 3,
            **row.overrides,
        }
        assert (
            math.prod(
                resolve(
                    apply_overrides(load_recipe("video_dit/wan_tiny_mhla_clips_cpu").values, given)
                ).task.grid
            )
            == 2048
        )


def test_unknown_packaged_rows_are_one_sentence() -> None:
    with pytest.raises(
        UserError, match=r"unknown variants .* 'language_qualty'.* did you mean 'language_quality'"
    ):
        variants_file("language_qualty")
    assert "variants/language_quality" not in recipe_names()


def test_a_missing_variants_file_is_one_sentence(tmp_path: Path) -> None:
    with refused(str(tmp_path / "nowhere.yaml")):
        rows_from_file(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    "name", ["mhla", "a, b", "../../etc", "...", "", "ä ö", "x" * 300, "-seed", "a/b", "1..2"]
)
def test_slugs_are_run_ids(name: str) -> None:
    assert len(check_run_id(VariantRow(name, slug(name), {}).run_id(0))) < 80


@pytest.mark.parametrize("text", ["", "0,", "a", "-1", "1.5", "0,0", "1,01"])
def test_seeds_refuse(text: str) -> None:
    with refused("seeds"):
        seed_list(text)


def test_seeds() -> None:
    assert seed_list("0, 1,20") == [0, 1, 20]


def test_a_rows_value_counts_and_deeper_keys_come_later() -> None:
    values = merged(
        {"model.attention.gate": True, "trainer.max_steps": 5, "x": 1},
        {"model.attention": "mhla", "trainer.max_steps": 2},
    )
    assert list(values.items()) == [
        ("x", 1),
        ("trainer.max_steps", 2),
        ("model.attention", "mhla"),
        ("model.attention.gate", True),
    ]


def test_overrides_survive_the_command_line() -> None:
    values = {
        "a.b": {"name": "mhla", "sizes": [4, 4]},
        "c": None,
        "d": True,
        "e": 1e-05,
        "f": "1e-5",
        "g": "--x",
        "h": "null",
        "i": "a: b #é",
    }
    assert parse_overrides(arguments(values)) == values


def test_identity_knows_everything_but_paths() -> None:
    recipe = {"data": {"init_args": {"path": "/a", "batch_size": 2}}}
    rows = rows_over(["x=[1, 2]"])
    same = identity(recipe, rows, [0], {})
    moved = {"data": {"init_args": {"path": "/b", "batch_size": 2}}}
    assert identity(moved, rows, [0], {"data.path": "/c"}) == same
    assert len(same) == 8
    larger = {"data": {"init_args": {"path": "/a", "batch_size": 4}}}
    others = [
        identity(larger, rows, [0], {}),
        identity(recipe, rows[:1], [0], {}),
        identity(recipe, rows, [1], {}),
        identity(recipe, rows, [0], {"y": 1}),
    ]
    assert len({same, *others}) == 5


# table


def summary(top1: float, **more: Any) -> dict[str, Any]:
    return {
        "last": {"val/top1": top1, "val/loss": 2 - top1},
        "best": {},
        "samples_per_second": 10.0,
        "parameters": 5,
        "seconds": 1.0,
        **more,
    }


def test_table_row_means_and_spreads() -> None:
    row = table_row("a", {"x": 1}, {0: summary(0.5), 3: summary(0.7, samples_per_second=None)})
    assert row["mean"]["val/top1"] == pytest.approx(0.6)
    assert row["spread"]["val/top1"] == pytest.approx(statistics.stdev([0.5, 0.7]))
    assert (row["mean"]["samples_per_second"], row["spread"]["samples_per_second"]) == (10.0, None)
    assert "peak_memory_bytes" not in row["mean"]
    assert [run["seed"] for run in row["seeds"]] == [0, 3]
    assert row["seeds"][0]["last"]["val/top1"] == 0.5


def test_spread_of_one_and_of_nan() -> None:
    assert spread([1.0]) is None
    assert spread([2.0, 2.0]) == 0
    assert math.isnan(spread([1.0, math.nan]) or 0)


def test_best_rows() -> None:
    rows = [
        table_row(name, {}, {0: summary(top1)})
        for name, top1 in [("a", 0.5), ("b", 0.9), ("c", 0.9), ("d", math.nan)]
    ]
    assert best_rows("val/top1", rows) == {"b", "c"}
    assert best_rows("val/loss", rows[:2]) == {"b"}
    assert best_rows("val/top1", rows[:1]) == best_rows("val/other", rows) == set()


def test_tags_and_headline() -> None:
    rows = [{"mean": {"val_ema/loss": 1, "val/top1": 1, "seconds": 1}}, {"mean": {"val/loss": 1}}]
    assert validation_tags(rows) == ["val/loss", "val/top1", "val_ema/loss"]
    assert headline(["train/loss", "val/loss", "val/top1"]) == "val/top1"
    assert headline(["val/fid", "val/loss"]) == "val/loss"
    assert headline(["val/fid"]) == "val/fid"
    assert headline(["train/loss"]) is None
    assert higher_is_better("val_ema/top5")
    assert not higher_is_better("val/loss")


def test_numbers_of_an_evaluation_stand_beside_validation() -> None:
    measured = {0: {"samples": {"fd": 3.0, "agreement": 0.9}}, 3: {"samples": {"fd": 5.0, "agreement": 0.7}}}
    row = table_row("a", {}, {0: summary(0.5), 3: summary(0.7)}, measured)
    assert row["mean"]["samples/fd"] == 4
    assert row["spread"]["samples/agreement"] == pytest.approx(statistics.stdev([0.9, 0.7]))
    assert [run["eval"] for run in row["seeds"]] == [measured[0], measured[3]]
    assert score_tags([row]) == ["val/loss", "val/top1", "samples/fd", "samples/agreement"]
    other = table_row("b", {}, {0: summary(0.5)}, {0: {"samples": {"fd": 4.5, "agreement": 0.95}}})
    assert (best_rows("samples/fd", [row, other]), best_rows("samples/agreement", [row, other])) == (
        {"a"},
        {"b"},
    )


@pytest.mark.parametrize("number", ["agreement", "class_score", "precision", "recall", "images_per_second"])
def test_what_samples_measures_is_best_high_but_distances(number: str) -> None:
    assert higher_is_better(f"samples/{number}")
    assert not any(higher_is_better(f"samples/{distance}") for distance in ("fd", "sfd"))


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("sampels", "eval"),
        ("samples: {clasifier: a}", "eval.samples.clasifier"),
        ("samples", "eval.samples.classifier"),
        ("samples: {n: 3, classifier: a}", "eval.samples.n"),
        ("samples: {n: true, classifier: a}", "eval.samples.n"),
        ("samples: {guidance: high, classifier: a}", "eval.samples.guidance"),
        ("samples: {ema: 1, classifier: a}", "eval.samples.ema"),
        ("samples: {classifier: 5}", "eval.samples.classifier"),
        ("samples: {seed: 4294967296, classifier: a}", "eval.samples.seed"),
        ("samples: {classifier", "eval"),
        ("samples: [1]", "eval"),
        ("{samples: {}, other: {}}", "eval"),
        ("5", "eval"),
    ],
)
def test_evaluations_that_are_none(text: str, key: str, tmp_path: Path) -> None:
    with refused(key):
        requested_evaluation(text, str(tmp_path))


def test_a_taken_name_of_an_evaluation_is_refused() -> None:
    with refused("name"):
        register_evaluation("samples", EVALUATIONS["samples"])


def test_numbers_as_shown() -> None:
    assert score(0.93124, 0.00211) == "0.9312 ±0.0021"
    assert score(0.93124, None) == "0.9312"
    assert score(123.456, 1.5) == "123.46 ±1.50"
    assert score(None, None) == "-"
    assert cost("flops_per_sample", 68126592) == "0.06813"
    assert cost("peak_memory_bytes", 1.2459e9) == "1,246"
    assert cost("parameters", 469994) == "469,994"
    assert cost("samples_per_second", None) == "-"


# curves


def test_smoothing_keeps_the_ends_and_straight_lines() -> None:
    line = [(step, 2.0 * step) for step in range(7)]
    assert smooth(line, 5) == line
    assert smooth([(0, 0.0), (1, 3.0), (2, 0.0)], 3) == [(0, 0.0), (1, 1.0), (2, 0.0)]
    assert smooth([], 3) == []


def test_smoothing_is_light_and_odd() -> None:
    widths = [
        smoothing_width({"a": [{"train/loss": [(0, 0.0)] * count}]}) for count in (0, 20, 90, 1000, 100_000)
    ]
    assert widths == [1, 1, 3, 25, 51]


def test_curves_skip_what_cannot_be_drawn() -> None:
    assert finite([(2, 1.0), (1, math.nan), (2, 3.0), (0, 5.0)]) == [(0, 5.0), (2, 3.0)]
    assert mean_curve([[(0, 1.0), (1, 2.0)], [(1, 4.0), (2, 9.0)]]) == [(1, 3.0)]
    assert mean_curve([]) == []


def test_figure_of_runs_without_accuracy_or_without_anything() -> None:
    figure = curves_figure("t", {"_a": [{"train/loss": [(1, 1.0)], "val/loss": [(1, 1.0)]}], "b": [{}]})
    assert figure.axes[1].get_ylabel() == "val/loss"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a"]
    assert not curves_figure("t", {"a": [{}]}).legends
