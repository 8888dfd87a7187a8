"""The notes under a comparison: what else its rows differ in, and what its validation cannot tell."""

from __future__ import annotations

from typing import Any

from mhla_lightning.attention import attention_entries
from mhla_lightning.backbones import build_backbone
from mhla_lightning.compare.comparison import table_row
from mhla_lightning.compare.fairness import remarks, warned

TINY: dict[str, Any] = {"img_size": 8, "patch_size": 2, "embed_dim": 12, "depth": 3, "num_heads": 2}


def row(name: str, entry: Any, top1: float, parameters: int = 100, seeds: int = 1) -> dict[str, Any]:
    """A row of the table, with the attention of a real model."""
    model = build_backbone("deit_tiny", attention=entry, num_classes=4, **TINY)
    summary = {
        "last": {"val/top1": top1},
        "attention": attention_entries(model),
        "val_samples": 1000,
        "parameters": parameters,
        "flops_per_sample": 1e9,
    }
    return table_row(name, {}, dict.fromkeys(range(seeds), summary))


def test_equal_rows_need_no_note() -> None:
    plain = {"pos_conv": "none", "qk_norm": False, "qkv_bias": True}
    entries = [{"name": name, **plain} for name in ("linear", "softmax")]
    assert remarks([row("a", entries[0], 0.9), row("b", entries[1], 0.8, parameters=101)]) == []


def test_options_of_the_layer_that_differ_are_named_with_their_values() -> None:
    rows = [row("linear", "linear", 0.7), row("mhla", {"name": "mhla", "blocks": 2}, 0.9)]
    assert "beside the operator, pos_conv differs: none in linear; lepe5 in mhla" in remarks(rows)
    assert [one["attention"].split()[0] for one in rows] == ["linear", "mhla"]
    assert "blocks=2" in rows[1]["attention"]


def test_a_hybrid_names_its_layers() -> None:
    one = row("hybrid", ["softmax", {"name": "mhla", "blocks": 2}], 0.9)
    assert one["attention"].startswith("2 softmax, 1 mhla ")
    notes = remarks([one, row("softmax", "softmax", 0.7)])
    assert "beside the operator, pos_conv differs: none and lepe5 in hybrid; none in softmax" in notes


def test_the_value_of_most_rows_is_named_once() -> None:
    rows = [row(name, {"name": "linear", "pos_conv": "none"}, 0.7) for name in "abc"]
    rows += [row(name, {"name": "linear", "pos_conv": "lepe3"}, 0.7) for name in "de"]
    assert remarks(rows)[0] == "beside the operator, pos_conv differs: lepe3 in d and e; none in the others"


def test_other_costs_are_named_above_one_percent() -> None:
    (note,) = remarks([row("a", "linear", 0.9), row("b", "linear", 0.5, parameters=102)])
    assert note == "the rows differ by 2.0% in parameters: 100 to 102"


def test_warnings_of_runs_become_notes_with_their_rows() -> None:
    found = {"a": ["all of it is warm-up", "skipped"], "b": ["all of it is warm-up"], "c": []}
    assert warned(found) == [
        "warning in row a and b: all of it is warm-up",
        "warning in row a: skipped",
    ]
    assert warned({"a": ["x"], "b": ["x"]}) == ["warning in all rows: x"]
    assert len(warned({"a": [str(number) for number in range(99)]})) == 20


def test_a_difference_that_the_validation_cannot_tell_is_named() -> None:
    near = [row("a", "linear", 0.90), row("b", "linear", 0.88)]
    (note,) = remarks(near)
    told = 1.96 * ((0.9 * 0.1 + 0.88 * 0.12) / 1000) ** 0.5
    assert note.startswith("val/top1: a and b are 0.0200 apart")
    assert f"above {told:.4f} (95 %)" in note
    seeds = [row("a", "linear", 0.90, seeds=4), row("b", "linear", 0.88, seeds=4)]
    assert remarks(seeds) == [note], "all seeds are judged on the same samples"
    assert remarks([row("a", "linear", 0.90), row("b", "linear", 0.86)]) == []
    assert remarks(near[:1]) == []


def test_runs_of_an_earlier_version_are_compared_as_before() -> None:
    rows = [
        table_row(name, {}, {0: {"last": {"val/top1": top1}}}) for name, top1 in (("a", 0.9), ("b", 0.89))
    ]
    assert remarks(rows) == []
    assert rows[0]["attention"] == ""
