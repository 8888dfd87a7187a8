"""Verdicts by rule, and claims that a study file may hold."""

from __future__ import annotations

from typing import Any

import pytest

from mhla_lightning.compare.comparison import table_row
from mhla_lightning.evidence.claims import Claim, Gap, judge, read_claim
from tests.helpers.errors import refused

NAMES = ["a", "b"]
NAN = float("nan")


def rows(a: list[float], b: list[float], tag: str = "val/top1") -> list[dict[str, Any]]:
    """Two rows whose seeds have these values."""
    return [
        table_row(name, {}, {seed: {"last": {tag: value}} for seed, value in enumerate(values)})
        for name, values in (("a", a), ("b", b))
    ]


def claim(sign: int = 1, by: float = 0.0, than: str | None = "b", always: bool = False) -> Claim:
    return Claim("says", "paper", "val/top1", "a", sign, than, by, always=always)


@pytest.mark.parametrize(
    ("made", "a", "b", "answer"),
    [
        pytest.param(claim(), [0.8, 0.81, 0.82], [0.5, 0.5, 0.52], "shown", id="far apart"),
        pytest.param(claim(), [0.5, 0.5, 0.52], [0.8, 0.81, 0.82], "contradicted", id="far the other way"),
        pytest.param(claim(-1), [0.5, 0.5, 0.52], [0.8, 0.81, 0.82], "shown", id="claimed to be low"),
        pytest.param(claim(-1), [0.8, 0.81, 0.82], [0.5, 0.5, 0.52], "contradicted", id="low, but high"),
        pytest.param(claim(), [0.8, 0.5, 0.6], [0.5, 0.6, 0.55], "not shown", id="0 is inside"),
        pytest.param(claim(), [0.8, 0.8], [0.8, 0.8], "not shown", id="equal to the last bit"),
        pytest.param(
            claim(by=0.2), [0.6, 0.61, 0.62], [0.5, 0.51, 0.52], "not shown", id="above 0, below by"
        ),
        pytest.param(claim(by=0.05), [0.6, 0.61, 0.62], [0.5, 0.51, 0.52], "shown", id="above by"),
        pytest.param(claim(by=-0.05), [0.5, 0.51, 0.52], [0.51, 0.52, 0.53], "shown", id="a little worse"),
        pytest.param(claim(by=-0.05), [0.4, 0.41, 0.42], [0.51, 0.52, 0.53], "contradicted", id="much worse"),
        pytest.param(claim(), [0.9], [0.1], "not shown", id="one seed has no interval"),
        pytest.param(claim(), [0.9, NAN], [0.1, 0.1], "not shown", id="a seed without a number is left out"),
        pytest.param(claim(), [], [0.1, 0.1], "not run", id="no pair"),
        pytest.param(claim(1, 0.95, None), [0.98, 0.99, 0.98], [], "shown", id="a value above"),
        pytest.param(claim(1, 0.95, None), [1.0, 1.0, 1.0], [], "shown", id="a value without a spread"),
        pytest.param(claim(1, 0.95, None), [0.99, 0.9, 0.99], [], "not shown", id="a value around"),
        pytest.param(claim(1, 0.95, None), [0.3, 0.31, 0.32], [], "contradicted", id="a value below"),
        pytest.param(claim(-1, 1.1, None), [0.9, 0.95, 0.92], [], "shown", id="at most"),
        pytest.param(claim(-1, 1.1, None), [1.9, 1.95, 1.92], [], "contradicted", id="at most, but above"),
        pytest.param(claim(-1, 1.0, None, True), [0.9, 1.0], [], "shown", id="a bound that all keep"),
        pytest.param(claim(-1, 1.0, None, True), [0.1, 1.01], [], "contradicted", id="one breaks a bound"),
        pytest.param(claim(1, 1.0, None, True), [1.0, 0.99], [], "contradicted", id="one is below a bound"),
    ],
)
def test_the_rule(made: Claim, a: list[float], b: list[float], answer: str) -> None:
    assert judge(made, rows(a, b)).answer == answer


def test_a_verdict_has_its_number_its_interval_and_its_seeds() -> None:
    found = judge(claim(), rows([0.8, 0.9, 1.0], [0.5, 0.5, 0.5]))
    assert found.mean == pytest.approx(0.4)
    assert found.half == pytest.approx(4.302653 * 0.1 / 3**0.5, rel=1e-6)
    assert found.seeds == 3
    worst = judge(claim(-1, 1.0, None, True), rows([0.9, 1.2, 1.0], []))
    assert (worst.mean, worst.half, worst.seeds) == (1.2, None, 3)


@pytest.mark.parametrize(
    ("sign", "far", "near", "answer"),
    [
        (1, [0.3, 0.31, 0.32], [0.1, 0.1, 0.12], "shown"),
        (1, [0.1, 0.1, 0.12], [0.3, 0.31, 0.32], "contradicted"),
        (-1, [-0.3, -0.31, -0.32], [-0.1, -0.1, -0.12], "shown"),
        (1, [0.1, 0.3, 0.1], [0.1, 0.1, 0.2], "not shown"),
    ],
)
def test_growth_is_a_difference_of_differences(
    sign: int, far: list[float], near: list[float], answer: str
) -> None:
    made = Claim("says", "paper", "x", "a", sign, "b", 0.0, base=Gap("y", "a", "b"))
    table = [
        table_row("a", {}, {s: {"last": {"x": 1 + far[s], "y": 2 + near[s]}} for s in range(3)}),
        table_row("b", {}, {s: {"last": {"x": 1.0, "y": 2.0}} for s in range(3)}),
    ]
    found = judge(made, table)
    assert found.answer == answer
    assert found.mean == pytest.approx(sum(far) / 3 - sum(near) / 3)


WORDS = {"says": "s", "paper": "p", "metric": "val/top1"}


def test_every_form_is_read() -> None:
    assert read_claim({**WORDS, "higher": "a", "than": "b", "by": 1}, NAMES).by == 1.0
    assert read_claim({**WORDS, "lower": "a", "than": "b"}, NAMES).sign == -1
    grown = read_claim({**WORDS, "lower": "a", "than": "b", "grows_from": {"metric": "m"}}, NAMES)
    assert grown.base == Gap("m", "a", "b")
    assert grown.rows() == ["a", "b", "a", "b"]
    bound = read_claim({**WORDS, "row": "a", "never_above": 1}, NAMES)
    assert (bound.sign, bound.by, bound.than, bound.always) == (-1, 1.0, None, True)
    assert not read_claim({**WORDS, "row": "a", "at_least": 0.95}, NAMES).always


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ("mhla wins", None),
        ({**WORDS, "higher": "a", "then": "b"}, "then"),
        ({"paper": "p", "metric": "m", "higher": "a", "than": "b"}, "says"),
        ({**WORDS, "paper": " ", "higher": "a", "than": "b"}, "paper"),
        (WORDS, "metric"),
        ({**WORDS, "higher": "a", "lower": "a", "than": "b"}, "metric"),
        ({**WORDS, "higher": "a"}, "than"),
        ({**WORDS, "higher": "c", "than": "b"}, "higher"),
        ({**WORDS, "higher": ["a"], "than": "b"}, "higher"),
        ({**WORDS, "higher": "a", "than": "b", "by": "much"}, "by"),
        ({**WORDS, "higher": "a", "than": "b", "by": NAN}, "by"),
        ({**WORDS, "higher": "a", "than": "b", "row": "a"}, "row"),
        ({**WORDS, "row": "a", "at_least": True}, "at_least"),
        ({**WORDS, "row": "a", "at_least": 1, "than": "b"}, "than"),
        ({**WORDS, "at_most": 1}, "row"),
        ({**WORDS, "higher": "a", "than": "b", "grows_from": {"from": "x"}}, "grows_from"),
        ({**WORDS, "higher": "a", "than": "b", "grows_from": {"row": "c"}}, "row"),
    ],
)
def test_other_claims_are_refused(given: object, key: str | None) -> None:
    with refused(key):
        read_claim(given, NAMES)
