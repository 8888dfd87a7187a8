"""Curves, matrices and pictures as JSON of bounded size, for the page's own JavaScript."""

from __future__ import annotations

import base64
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mhla_lightning.compare.curves import mean_curve
from mhla_lightning.evaluation.tags import higher_is_better
from mhla_lightning.report.comparison import RowReport
from mhla_lightning.report.events import picture_kind
from mhla_lightning.report.folder import Curve
from mhla_lightning.report.run import RunReport
from mhla_lightning.runs.tags import GROUPS, HEATMAPS, group_of, matrix_titles, unit_of

MOST_POINTS = 1000  # of a curve
MOST_PICTURES = 12 * 2**20  # bytes of the pictures of a page
MOST_MATRICES = 1_500_000  # numbers of the mixing matrices of a page, 2 bytes each
MOST_LAYERS = 256  # of a run
MOST_SETS = 60  # sliders of pictures
MOST_FRAMES = 40  # places of a slider
_AVERAGED = re.compile(r"(^|/)val_ema(?=[/_])")
_HEATMAPS = re.compile(rf"({HEATMAPS}|mixing)(_\d+)?")  # the latter in runs of earlier versions
_FIRST = ("train/loss", "val/loss", "val/top1", "val/accuracy", "val/bits_per_byte")

Note = Callable[[str], None]


def thin_curve(curve: Curve) -> Curve:
    """Return at most MOST_POINTS points of a curve: the extremes of each stretch, and both ends."""
    if len(curve) <= MOST_POINTS:
        return curve
    stretches = np.array_split(np.arange(len(curve)), MOST_POINTS // 2 - 1)
    kept = {0, len(curve) - 1}
    for stretch in stretches:
        kept.add(min(stretch, key=lambda index: curve[index][1]))
        kept.add(max(stretch, key=lambda index: curve[index][1]))
    return [curve[index] for index in sorted(kept)]


def thin_places(places: Sequence[int], most: int) -> list[int]:
    """Return at most `most` of some places, evenly spaced, with the first and the last."""
    if len(places) <= most:
        return list(places)
    if most < 2:
        return [places[-1]]
    return [
        places[index] for index in sorted({round(index) for index in np.linspace(0, len(places) - 1, most)})
    ]


def charts(runs: Sequence[tuple[int, str, Mapping[str, Curve], bool]]) -> list[dict[str, Any]]:
    """Return the charts of the page, by group.

    Args:
        runs: number of the series, its name, its curves, and whether they are one seed of several.
    """
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for series, name, curves, seed in runs:
        for tag, curve in curves.items():
            points = thin_curve(curve)
            found[_AVERAGED.sub(r"\1val", tag)].append(
                {
                    "series": series,
                    "name": name,
                    "averaged": _AVERAGED.search(tag) is not None,
                    "seed": seed,
                    "x": [step for step, _ in points],
                    "y": [float(f"{value:.6g}") for _, value in points],
                }
            )
    order = sorted(
        found,
        key=lambda tag: (GROUPS.index(group_of(tag)), tag not in _FIRST, "train" not in tag, tag),
    )
    return [
        {
            "tag": tag,
            "group": group_of(tag),
            "unit": unit_of(tag),
            "high": higher_is_better(tag),
            "curves": found[tag],
        }
        for tag in order
    ]


def row_curves(number: int, row: RowReport) -> list[tuple[int, str, Mapping[str, Curve], bool]]:
    """Return the mean over the seeds of a row and the seeds, as :func:`charts` takes them."""
    if len(row.runs) == 1:
        return [(number, row.name, row.runs[0].curves, False)]
    tags = dict.fromkeys(tag for run in row.runs for tag in run.curves)
    mean = {tag: mean_curve([run.curves[tag] for run in row.runs if tag in run.curves]) for tag in tags}
    mean = {tag: curve for tag, curve in mean.items() if curve}
    return [
        (number, f"{row.name}, mean", mean, False),
        *((number, run.name, _without_averages(run.curves), True) for run in row.runs),
    ]


def _without_averages(curves: Mapping[str, Curve]) -> dict[str, Curve]:
    """Return the curves of a seed without those of averaged weights, whose mean is drawn."""
    return {tag: curve for tag, curve in curves.items() if not _AVERAGED.search(tag)}


def matrices(runs: Iterable[tuple[int, RunReport]], note: Note) -> list[dict[str, Any]]:
    """Return the mixing matrices of runs: 16 bit numbers of 0 to the largest, in base64."""
    held = [(number, run) for number, run in runs if run.events.mixing]
    found = []
    for number, run in held:
        layers = run.events.mixing
        # a layer's matrices of one size: that of its newest
        shapes = {name: steps[max(steps)].shape for name, steps in layers.items() if steps}
        shapes = dict(list(shapes.items())[:MOST_LAYERS])
        steps = sorted(
            {step for name in shapes for step, one in layers[name].items() if one.shape == shapes[name]}
        )
        names, kept = _within(list(shapes), shapes, steps, MOST_MATRICES // len(held))
        if len(kept) < len(steps) or len(names) < len(shapes):
            note(
                f"Run {run.name}: of its mixing matrices the page shows {len(kept)} of {len(steps)} steps "
                f"and {len(names)} of {len(shapes)} layers."
            )
        largest = max(
            (float(layers[name][step].max()) for name in names for step in layers[name] if step in kept),
            default=0.0,
        )
        found.append(
            {
                "series": number,
                "name": run.name,
                "steps": kept,
                "largest": largest,
                "layers": [
                    {
                        "name": name,
                        "title": title,
                        "rows": shapes[name][0],
                        "columns": shapes[name][1],
                        "values": [_packed(layers[name].get(step), shapes[name], largest) for step in kept],
                    }
                    for name, title in zip(names, matrix_titles(names), strict=True)
                ],
            }
        )
    return found


def _within(
    names: list[str], shapes: Mapping[str, tuple[int, ...]], steps: list[int], most: int
) -> tuple[list[str], list[int]]:
    """Return the layers and steps that fit: first fewer steps, at least two, then fewer layers."""
    size = sum(shapes[name][0] * shapes[name][1] for name in names)
    kept = thin_places(steps, max(2, min(MOST_FRAMES, most // max(1, size))))
    while names and sum(shapes[name][0] * shapes[name][1] for name in names) * len(kept) > most:
        names = names[:-1]
    return names, kept


def _packed(matrix: np.ndarray | None, shape: tuple[int, ...], largest: float) -> str | None:
    if matrix is None or matrix.shape != shape:
        return None
    scaled = np.clip(matrix / (largest or 1.0), 0, 1) * 65535
    return base64.b64encode(scaled.round().astype("<u2").tobytes()).decode()


def pictures(runs: Iterable[tuple[int, RunReport]], note: Note) -> list[dict[str, Any]]:
    """Return the pictures of runs: a slider for each tag, and one for what `mhla sample` drew."""
    sets: list[tuple[int, RunReport, str, list[tuple[str, bytes]]]] = []
    for number, run in runs:
        for tag, found in run.events.pictures.items():
            from_values = run.events.mixing and _HEATMAPS.fullmatch(tag)  # drawn anew on the page
            if found and not from_values:
                steps = thin_places(sorted(found), MOST_FRAMES)
                if len(steps) < len(found):
                    note(f"Run {run.name}: {len(steps)} of {len(found)} pictures of {tag} are on the page.")
                sets.append((number, run, tag, [(f"step {step:,}", found[step]) for step in steps]))
        if run.drawn:
            sets.append((number, run, "drawn by mhla sample", list(run.drawn.items())[-MOST_FRAMES:]))
    if len(sets) > MOST_SETS:
        note(f"The page shows {MOST_SETS} of {len(sets)} kinds of pictures.")
    shown = sets[:MOST_SETS]
    return [_picture_set(*one, MOST_PICTURES // len(shown), note) for one in shown]


def _picture_set(
    number: int, run: RunReport, tag: str, frames: list[tuple[str, bytes]], most: int, note: Note
) -> dict[str, Any]:
    whole = len(frames)
    while len(frames) > 1 and sum(len(data) for _, data in frames) > most:
        keep = thin_places(range(len(frames)), len(frames) // 2 + 1 if len(frames) > 2 else 1)
        frames = [frames[index] for index in keep]
    if frames and sum(len(data) for _, data in frames) > most:
        frames = []
    if len(frames) < whole:
        note(
            f"Run {run.name}: {len(frames)} of {whole} pictures of {tag} are on the page; more are too large."
        )
    shown = [
        {"label": label, "source": f"data:{picture_kind(data)};base64,{base64.b64encode(data).decode()}"}
        for label, data in frames
    ]
    return {"series": number, "name": run.name, "title": tag, "frames": shown}


def intervals(rows: Sequence[RowReport], tags: Sequence[str]) -> list[dict[str, Any]]:
    """Return a plot for each tag: the seeds, their mean and its interval, of every row."""
    return [
        {
            "tag": tag,
            "unit": unit_of(tag),
            "high": higher_is_better(tag),
            "rows": [
                {
                    "series": number,
                    "name": row.name,
                    "mean": found.mean,
                    "half": found.half,
                    "values": found.values,
                    "text": found.text(),
                }
                for number, row in enumerate(rows)
                if (found := row.scores.get(tag)) is not None
            ],
        }
        for tag in tags
    ]


def script_json(value: Any) -> str:
    """Return JSON that cannot end the script element that holds it."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
