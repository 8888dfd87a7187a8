"""What the rows of a comparison differ in, and which differences its validation can tell.

Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mhla_lightning.compare.comparison import best_rows, entries_of
from mhla_lightning.runs.folder import shortened

_ACCURACIES = ("val/top1", "val/accuracy")
_TOLERATED = 0.01  # of parameters or FLOPs
_MOST_WARNINGS, _LONGEST_WARNING = 20, 300
_NAMED = 2  # rows of one value; more are "the others"
_CONFIDENCE = 1.96  # standard deviations of a 95 % interval
_COSTS = {"parameters": ("parameters", ",.0f", 1.0), "flops_per_sample": ("GFLOPs a sample", ".4g", 1e-9)}

Row = Mapping[str, Any]
"""A row of table.json, see table_row."""


def remarks(rows: Sequence[Row]) -> list[str]:
    """Return the notes under a table: what else differs, and what is too small to be seen."""
    return [*_options(rows), *_costs(rows), *_small_validations(rows)]


def warned(warnings: Mapping[str, Sequence[str]]) -> list[str]:
    """Return a note for each warning of the runs, with the rows that it is of.

    Args:
        warnings: name of a row -> what its runs warned of.
    """
    texts = dict.fromkeys(text for found in warnings.values() for text in found)
    notes = []
    for text in list(texts)[:_MOST_WARNINGS]:
        names = [name for name, found in warnings.items() if text in found]
        rows = "all rows" if len(names) == len(warnings) else f"row {' and '.join(names)}"
        notes.append(f"warning in {rows}: {shortened(text, _LONGEST_WARNING)}")
    return notes


def _options(rows: Sequence[Row]) -> Iterator[str]:
    """Options of the layers around the operators: convolutions, gates, norms."""
    layers = {
        row["name"]: [entry["layer"] for entry in entries_of(row["seeds"])]
        for row in rows
        if entries_of(row["seeds"])
    }
    options = dict.fromkeys(option for found in layers.values() for layer in found for option in layer)
    for option in options:
        rows_of: dict[str, list[str]] = {}
        for name, found in layers.items():
            value = " and ".join(dict.fromkeys(str(layer.get(option)) for layer in found))
            rows_of.setdefault(value, []).append(name)
        if len(rows_of) > 1:
            yield f"beside the operator, {option} differs: {_by_value(rows_of)}"


def _by_value(rows_of: Mapping[str, Sequence[str]]) -> str:
    """Say which rows have which value; of many rows the commonest value is that of the others."""
    *rare, (common, rows) = sorted(rows_of.items(), key=lambda found: len(found[1]))
    shown = [f"{value} in {' and '.join(names)}" for value, names in rare]
    return "; ".join([*shown, f"{common} in {'the others' if len(rows) > _NAMED else ' and '.join(rows)}"])


def _costs(rows: Sequence[Row]) -> Iterator[str]:
    for key, (title, form, factor) in _COSTS.items():
        found = [row["mean"][key] for row in rows if key in row["mean"]]
        if found and max(found) > (1 + _TOLERATED) * min(found):
            least, most = (f"{value * factor:{form}}" for value in (min(found), max(found)))
            yield f"the rows differ by {max(found) / min(found) - 1:.1%} in {title}: {least} to {most}"


def _small_validations(rows: Sequence[Row]) -> Iterator[str]:
    """Accuracies whose best two rows are nearer than the samples of validation can tell."""
    for tag in _ACCURACIES:
        scored = sorted((row for row in rows if tag in row["mean"]), key=lambda row: -row["mean"][tag])
        samples = scored[0]["seeds"][0].get("val_samples") if len(scored) > 1 else None
        if not samples or not best_rows(tag, rows):
            continue
        first, second = scored[:2]
        gap = first["mean"][tag] - second["mean"][tag]
        variance = sum(row["mean"][tag] * (1 - row["mean"][tag]) for row in (first, second)) / samples
        told = _CONFIDENCE * math.sqrt(variance)  # all seeds are judged on the same samples
        if gap < told:
            yield (
                f"{tag}: {first['name']} and {second['name']} are {gap:.4f} apart, and {samples:,} "
                f"validation samples tell differences above {told:.4f} (95 %)"
            )
