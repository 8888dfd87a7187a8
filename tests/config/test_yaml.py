"""The YAML of recipes: keys given twice, and anchors."""

from __future__ import annotations

import pytest
import yaml

from mhla_lightning.config.recipes import parse_yaml


@pytest.mark.parametrize(
    "text",
    [
        # merged deeper than it stands, and before it is built itself
        "base: &base {lr: 1, eps: 2}\nown: &own {<<: *base, lr: 3}\ntop: {deep: {deeper: {<<: *own}}}",
        "base: &base {lr: 1, eps: 2}\ntop: {first: &own {<<: *base, lr: 3}, deep: {<<: *own}}\nown: *own",
        "base: &base {lr: 1, eps: 2}\nown: &own\n  <<: *base\n  lr: 3\ntop: [{deep: {<<: [*own, *base]}}]",
    ],
)
def test_an_anchor_is_merged_at_any_depth(text: str) -> None:
    found = parse_yaml(text)
    merged = found["top"][0] if isinstance(found["top"], list) else found["top"]
    while "lr" not in merged:
        merged = merged["deep"] if "deep" in merged else merged["deeper"]
    assert merged == found["own"] == {"lr": 3, "eps": 2}
    assert found["base"] == {"lr": 1, "eps": 2}


@pytest.mark.parametrize(
    "text",
    ["lr: 1\nlr: 2", "a: {lr: 1, lr: 2}", "b: &b {lr: 1}\na: {<<: *b, lr: 1, lr: 2}"],
)
def test_a_key_written_twice_is_refused(text: str) -> None:
    with pytest.raises(yaml.MarkedYAMLError, match="key 'lr' is given twice"):
        parse_yaml(text)
