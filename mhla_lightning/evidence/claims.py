"""Claims, and the rule that decides them by 95 % intervals over seeds.

Imports no torch.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mhla_lightning.compare.comparison import values_by_seed
from mhla_lightning.compare.student import half_width
from mhla_lightning.errors import UserError, unknown_name

Answer = Literal["shown", "contradicted", "not shown", "not run"]
_COMPARED = ("higher", "lower")
_ALWAYS = ("never_below", "never_above")
_BOUNDED = ("at_least", "at_most", *_ALWAYS)
_KEYS = ("says", "paper", "metric", *_COMPARED, "than", "by", "grows_from", "row", *_BOUNDED)
_GAP_KEYS = ("metric", "row", "than")


@dataclass(frozen=True)
class Gap:
    """The difference of two rows in a metric: row minus than.

    Args:
        metric: tag of the table.
        row, than: names of rows.
    """

    metric: str
    row: str
    than: str


@dataclass(frozen=True)
class Claim:
    """One statement with the numbers that decide it.

    Args:
        says: the claim in words.
        paper: what the paper reports, with its table or figure.
        metric: tag of the table.
        row: the row that the claim is about.
        sign: 1 where the row is claimed to be high, -1 where low.
        than: the other row; None where the value is compared with a number.
        by: the least difference, or the number, in the units of the metric. A negative difference allows the
            row to be worse by as much.
        base: the gap that must be smaller by more than `by`; None where the claim is about one gap.
        always: every seed must keep the bound: a theorem, which no interval decides.
    """

    says: str
    paper: str
    metric: str
    row: str
    sign: int
    than: str | None
    by: float
    base: Gap | None = None
    always: bool = False

    def rows(self) -> list[str]:
        """Return the names of all rows that the claim needs."""
        names = [self.row, self.than, *((self.base.row, self.base.than) if self.base else ())]
        return [name for name in names if name is not None]


@dataclass(frozen=True)
class ClaimVerdict:
    """What the seeds say about a claim.

    Attributes:
        answer: by the rule of :func:`judge`.
        mean: of the difference row minus than, of the growth of that difference, or of the value; the value
            of the seed that is worst where all must keep a bound. None without a seed.
        half: half the width of its 95 % interval; None for fewer than two seeds, and for a worst value.
        seeds: number of pairs.
    """

    answer: Answer
    mean: float | None
    half: float | None
    seeds: int


def judge(claim: Claim, rows: Sequence[Mapping[str, Any]]) -> ClaimVerdict:
    """Decide a claim.

    - shown: the whole 95 % interval over seeds is beyond `by` in the claimed direction.
    - contradicted: the whole interval is on the other side of 0; of `by` where that is negative or a value.
    - not shown: everything else.

    A bound that must always hold is contradicted by one seed.

    Args:
        claim: to decide.
        rows: of a table, see compare.comparison.table_row.
    """
    found = _by_seed(claim, {row["name"]: row for row in rows})
    values = [found[seed] for seed in sorted(found)]
    if not values:
        return ClaimVerdict("not run", None, None, 0)
    if claim.always:
        worst = claim.sign * min(claim.sign * value for value in values)
        kept = claim.sign * worst >= claim.sign * claim.by
        return ClaimVerdict("shown" if kept else "contradicted", worst, None, len(values))
    mean, half = statistics.fmean(values), half_width(values)
    if half is None:
        return ClaimVerdict("not shown", mean, None, len(values))
    low, high = sorted((claim.sign * (mean - half), claim.sign * (mean + half)))
    if claim.than is None:
        bound = claim.sign * claim.by
        answer: Answer = "shown" if low >= bound else "contradicted" if high < bound else "not shown"
    else:
        answer = "shown" if low > claim.by else "contradicted" if high < min(0, claim.by) else "not shown"
    return ClaimVerdict(answer, mean, half, len(values))


def _by_seed(claim: Claim, rows: Mapping[str, Mapping[str, Any]]) -> dict[int, float]:
    """Return the number that decides the claim, of every seed that has all of its parts."""
    if claim.than is None:
        return values_by_seed(rows[claim.row], claim.metric)
    gap = _gap(Gap(claim.metric, claim.row, claim.than), rows)
    if claim.base is None:
        return gap
    base = _gap(claim.base, rows)
    return {seed: value - base[seed] for seed, value in gap.items() if seed in base}


def _gap(gap: Gap, rows: Mapping[str, Mapping[str, Any]]) -> dict[int, float]:
    first, second = (values_by_seed(rows[name], gap.metric) for name in (gap.row, gap.than))
    return {seed: value - second[seed] for seed, value in first.items() if seed in second}


def read_claim(given: object, rows: Sequence[str]) -> Claim:
    """Return the claim of a study file.

    Args:
        given: `says`, `paper` and one of these forms:
            {metric, higher: ROW, than: ROW, by: 0.0}, or `lower`;
            the same with {grows_from: {metric, row, than}}, whose missing keys are those of the claim;
            {metric, row: ROW, at_least: NUMBER}, or `at_most`;
            {metric, row: ROW, never_above: NUMBER}, or `never_below`.
        rows: names of the study.

    Raises:
        UserError: another form; the key is that of the claim.
    """
    if not isinstance(given, Mapping):
        raise UserError(None, f"found {given!r}; a claim is a mapping with {', '.join(_KEYS)}")
    for key in given:
        if key not in _KEYS:
            raise UserError(str(key), unknown_name("key", key, _KEYS, of="a claim"))
    says, paper, metric = (_text(given, key) for key in ("says", "paper", "metric"))
    kinds = [key for key in (*_COMPARED, *_BOUNDED) if key in given]
    if len(kinds) != 1:
        raise UserError(
            "metric",
            f"found {' and '.join(kinds) or 'none'}; a claim has one of {', '.join((*_COMPARED, *_BOUNDED))}",
        )
    kind = kinds[0]
    needed, foreign = (("row",), ("than", "by", "grows_from")) if kind in _BOUNDED else (("than",), ("row",))
    for key in (*needed, *(key for key in foreign if key in given)):
        if key in foreign:
            raise UserError(key, f"does not go with {kind}; leave it out")
        _row(given, key, rows)
    if kind in _BOUNDED:
        sign = 1 if kind in ("at_least", "never_below") else -1
        number = _number(given, kind)
        return Claim(says, paper, metric, given["row"], sign, None, number, always=kind in _ALWAYS)
    claim = Claim(
        says,
        paper,
        metric,
        _row(given, kind, rows),
        1 if kind == "higher" else -1,
        given["than"],
        _number(given, "by") if "by" in given else 0.0,
    )
    if "grows_from" not in given:
        return claim
    return Claim(**{**vars(claim), "base": _base(given["grows_from"], claim, rows)})


def _base(given: object, claim: Claim, rows: Sequence[str]) -> Gap:
    if not isinstance(given, Mapping) or not given or any(key not in _GAP_KEYS for key in given):
        raise UserError("grows_from", f"found {given!r}; write a mapping with some of {', '.join(_GAP_KEYS)}")
    whole = {"metric": claim.metric, "row": claim.row, "than": claim.than, **given}
    return Gap(_text(whole, "metric"), _row(whole, "row", rows), _row(whole, "than", rows))


def _text(given: Mapping[str, Any], key: str) -> str:
    value = given.get(key)
    if not isinstance(value, str) or not value.strip():
        raise UserError(key, f"found {value!r}; it must be text")
    return value


def _row(given: Mapping[str, Any], key: str, rows: Sequence[str]) -> str:
    value = given.get(key)
    if value not in rows:
        raise UserError(key, unknown_name("row", value, rows))
    return str(value)


def _number(given: Mapping[str, Any], key: str) -> float:
    value = given.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise UserError(key, f"found {value!r}; it must be a finite number")
    return float(value)
