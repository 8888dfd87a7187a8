"""The table of a comparison, from the summary.json of its runs. Imports no torch."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from mhla_lightning.compare.student import half_width
from mhla_lightning.compare.variants import words
from mhla_lightning.evaluation import EVALUATIONS
from mhla_lightning.evaluation.tags import higher_is_better

# key of summary.json -> (heading, factor to its unit, format)
COSTS = {
    "samples_per_second": ("samples\n/s", 1.0, ",.1f"),
    "parameters": ("parameters", 1.0, ",.0f"),
    "flops_per_sample": ("GFLOPs/\nsample", 1e-9, ".4g"),
    "peak_memory_bytes": ("peak\nMB", 1e-6, ",.0f"),
}
_NUMBERS = (*COSTS, "steps", "seconds")


def table_row(
    name: str,
    overrides: Mapping[str, Any],
    runs: Mapping[int, Mapping[str, Any]],
    measured: Mapping[int, Mapping[str, Mapping[str, float]]] | None = None,
) -> dict[str, Any]:
    """One row of table.json.

    Args:
        name: of the row.
        overrides: the row's own.
        runs: seed -> content of summary.json.
        measured: seed -> name of an evaluation -> its numbers.

    Returns:
        name, overrides, attention in words, and seeds (each run's summary, and `eval` where it was
        measured). Also, by tag or key, the mean over seeds and the sample standard deviation (None with one
        seed). The numbers of an evaluation have the tags `NAME/number`.
    """
    evaluated = {seed: {"eval": found} for seed, found in (measured or {}).items() if found}
    numbers = [
        {**_numbers(summary), **_tagged((measured or {}).get(seed, {}))} for seed, summary in runs.items()
    ]
    keys = list(dict.fromkeys(key for found in numbers for key in found))
    columns = {key: [found[key] for found in numbers if key in found] for key in keys}
    return {
        "name": name,
        "overrides": dict(overrides),
        "attention": attention_of(runs),
        "seeds": [{"seed": seed, **summary, **evaluated.get(seed, {})} for seed, summary in runs.items()],
        "mean": {key: statistics.fmean(values) for key, values in columns.items()},
        "spread": {key: spread(values) for key, values in columns.items()},
    }


def _numbers(summary: Mapping[str, Any]) -> dict[str, float]:
    found = {**summary.get("last", {}), **{key: summary.get(key) for key in _NUMBERS}}
    return {key: float(value) for key, value in found.items() if value is not None}


def _tagged(evaluations: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    return {
        f"{name}/{number}": value for name, found in evaluations.items() for number, value in found.items()
    }


def spread(values: Sequence[float]) -> float | None:
    """Return the sample standard deviation (n - 1).

    None for fewer than two values, nan where one is not finite.
    """
    if len(values) < 2:
        return None
    return statistics.stdev(values) if all(math.isfinite(value) for value in values) else math.nan


def validation_tags(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the `val/` tags of any row, then those of other validations.

    Others are `val_512/` (at another length) and `val_ema/` (averaged weights).
    """
    tags = {tag for row in rows for tag in row["mean"] if tag.startswith("val")}

    def place(tag: str) -> tuple[int, str, str]:
        validation, _, name = tag.partition("/")
        return int("".join(re.findall(r"\d", validation)) or 0), validation, name

    return sorted(tags, key=place)


def score_tags(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns of scores: validation, then evaluations in the order of their numbers."""
    evaluated = dict.fromkeys(
        tag for row in rows for tag in row["mean"] if tag.rpartition("/")[0] in EVALUATIONS
    )
    return [*validation_tags(rows), *evaluated]


def headline(tags: Iterable[str]) -> str | None:
    """Return the tag that sums up a run in one line.

    Accuracy, else bits per byte, else the loss, else the first tag of validation.
    """
    found = [tag for tag in tags if tag.startswith("val/")]
    return next(
        (
            tag
            for tag in ("val/top1", "val/accuracy", "val/bits_per_byte", "val/loss", *found)
            if tag in found
        ),
        None,
    )


def values_by_seed(row: Mapping[str, Any], tag: str) -> dict[int, float]:
    """Return the scores of a row of table.json by seed; seeds without a finite one are left out."""
    found: dict[int, float] = {}
    for seed in row["seeds"]:
        name, _, number = tag.rpartition("/")
        measured = seed.get("eval", {}).get(name, {})
        value = seed.get("last", {}).get(tag, measured.get(number))
        if value is not None and math.isfinite(value):
            found[seed["seed"]] = float(value)
    return found


def best_rows(tag: str, rows: Sequence[Mapping[str, Any]]) -> set[str]:
    """Return the names of the rows with the best mean of a tag.

    Empty where there is no other row to compare with.
    """
    means = {row["name"]: row["mean"][tag] for row in rows if math.isfinite(row["mean"].get(tag, math.nan))}
    if len(means) < 2:
        return set()
    best = (max if higher_is_better(tag) else min)(means.values())
    return {name for name, mean in means.items() if mean == best}


def score(mean: float | None, half: float | None) -> str:
    """Return a mean with half its interval, as many decimals for both: `0.9312 ±0.0021`.

    Narrow tables break it before the sign. A dash is no value.
    """
    if mean is None:
        return "-"
    decimals = 4 if abs(mean) < 10 else 3 if abs(mean) < 100 else 2
    return f"{mean:.{decimals}f}" if half is None else f"{mean:.{decimals}f} ±{half:.{decimals}f}"


def cost(key: str, mean: float | None) -> str:
    """A mean of COSTS in its unit; a dash where there is no value."""
    _, factor, form = COSTS[key]
    return "-" if mean is None else f"{mean * factor:{form}}"


def entries_of(runs: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the attentions of the first run of a row, see attention.attention_entries."""
    return next((run.get("attention") or [] for run in runs), [])


def attention_of(runs: Mapping[int, Mapping[str, Any]]) -> str:
    """Return the operators of a row with their options: `mhla blocks=2`, or `2 softmax, 4 mhla`.

    Empty for a run of a version that did not write them, and for a model without attention.

    Args:
        runs: seed -> content of summary.json.
    """
    entries = entries_of(runs.values())
    texts = [words({"name": entry["name"], **entry["operator"]}) for entry in entries]
    if len(entries) == 1:
        return texts[0]
    return ", ".join(f"{entry['layers']} {text}" for entry, text in zip(entries, texts, strict=True))


def rich_table(
    title: str, rows: Sequence[Mapping[str, Any]], tags: Sequence[str], costs: Sequence[str]
) -> Table:
    """One line a row; the best mean of every tag in bold.

    Args:
        title: above the table.
        rows: of table_row.
        tags: columns with a mean and half its 95 % interval over seeds.
        costs: columns of COSTS.
    """
    winners = {tag: best_rows(tag, rows) for tag in tags}
    several = len(rows[0]["seeds"]) > 1
    table = Table(title=Text(title), caption=_caption(rows) if tags and several else None)
    table.add_column("row", overflow="fold")
    attention = [row["attention"] for row in rows] if costs else []
    if any(attention):
        table.add_column("attention", overflow="fold")
    for heading in (*(tag.replace("/", "/\n") for tag in tags), *(COSTS[key][0] for key in costs)):
        table.add_column(heading, justify="right", overflow="fold")
    for number, row in enumerate(rows):
        scores = (_score(row, tag, row["name"] in winners[tag]) for tag in tags)
        operator = [Text(attention[number] or "-")] if any(attention) else []
        numbers = (cost(key, row["mean"].get(key)) for key in costs)
        table.add_row(Text(row["name"]), *operator, *scores, *numbers)
    return table


def _caption(rows: Sequence[Mapping[str, Any]]) -> str:
    counts = sorted({len(row["seeds"]) for row in rows})
    return f"mean over {' to '.join(map(str, counts))} seeds ±half of its 95 % interval (Student's t)"


def _score(row: Mapping[str, Any], tag: str, best: bool) -> Text:
    half = half_width(list(values_by_seed(row, tag).values()))
    return Text(score(row["mean"].get(tag), half), style="bold" if best else "")
