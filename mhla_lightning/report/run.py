"""What the page says about one run, read from its folder."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mhla_lightning.config.recipes import read_yaml
from mhla_lightning.errors import UserError
from mhla_lightning.evaluation.tags import higher_is_better
from mhla_lightning.report.events import MOST_PICTURE, Events, picture_kind, read_events
from mhla_lightning.report.folder import MOST_JSON, Curve, SafeFolder, finite, mapping
from mhla_lightning.runs.folder import RunFolder, newest_checkpoint

_MOST_TAGS = 300
_MOST_VALUE = 300  # characters of a value in a table
_DRAWN = ("images/*/grid.png", "videos/*/sheet.png")  # where `mhla sample` writes

Facts = dict[str, dict[str, str]]
"""section -> name -> value, both as text"""


@dataclass
class RunReport:
    """A run as the page shows it.

    Attributes:
        name: of the run folder.
        curves: tag -> finite points.
        numbers: tag of validation -> (last, best).
        facts: tables of names and values.
        events: pictures and mixing matrices of the event files.
        drawn: name -> bytes of pictures that `mhla sample` wrote.
        recipe: the text of the recipe.
        notes: what was left out.
    """

    name: str
    curves: dict[str, Curve]
    numbers: dict[str, tuple[float, float]]
    facts: Facts
    events: Events
    drawn: dict[str, bytes] = field(default_factory=dict)
    recipe: str = ""
    notes: list[str] = field(default_factory=list)


def read_run(path: Path) -> RunReport:
    """Read a run folder that may come from a stranger, be damaged, or be written to.

    Args:
        path: of the run folder.
    """
    folder, run = SafeFolder(path), RunFolder(path.resolve())
    curves = folder.curves(run.metrics)
    if len(curves) > _MOST_TAGS:
        folder.note(f"The run has {len(curves)} curves; the page shows {_MOST_TAGS}.")
        curves = dict(list(curves.items())[:_MOST_TAGS])
    if not curves:
        folder.note("No curve is known yet: metrics.jsonl is missing or empty.")
    elif not any(tag.startswith("val") for tag in curves):
        folder.note("The run has not validated yet, so it has no numbers of validation.")
    recipe = _recipe(folder, run)
    report = RunReport(
        run.run_id,
        curves,
        _numbers(curves),
        _facts(folder, run, recipe, curves),
        read_events(folder, run.tensorboard),
    )
    report.drawn, report.recipe, report.notes = _drawings(folder), folder.text(run.recipe), folder.notes
    return report


def _recipe(folder: SafeFolder, run: RunFolder) -> dict[str, Any]:
    """Return the recipe; empty, with a note, where it cannot be read."""
    file = folder.file(run.recipe, MOST_JSON)
    if file is None:
        return {}
    try:
        return mapping(read_yaml(file))
    except (UserError, RecursionError):
        folder.note("recipe.yaml is no YAML: it is damaged, or was edited.")
        return {}


def _numbers(curves: Mapping[str, Curve]) -> dict[str, tuple[float, float]]:
    """Return the last and the best value of every tag of validation."""
    found = {}
    for tag, points in curves.items():
        if tag.startswith("val"):
            values = [value for _, value in points]
            found[tag] = (values[-1], (max if higher_is_better(tag) else min)(values))
    return found


def _drawings(folder: SafeFolder) -> dict[str, bytes]:
    found = {}
    for pattern in _DRAWN:
        for path in folder.files(pattern, MOST_PICTURE):
            data = path.read_bytes()
            if picture_kind(data) is not None:
                found[path.parent.name] = data
    return found


def _facts(
    folder: SafeFolder, run: RunFolder, recipe: Mapping[str, Any], curves: Mapping[str, Curve]
) -> Facts:
    summary, progress = folder.object(run.summary), folder.object(run.progress)
    environment = folder.object(run.environment)
    newest = newest_checkpoint(run.path)
    state = folder.object(newest / "state.json") if newest is not None else {}
    return {
        "What was trained": _trained(recipe, summary, progress),
        "Speed and memory": _costs(summary, progress, curves),
        "Data and order": _data(recipe, progress, state, curves),
        "Environment": _environment(environment, progress),
    }


def _trained(
    recipe: Mapping[str, Any], summary: Mapping[str, Any], progress: Mapping[str, Any]
) -> dict[str, str]:
    task, model = _arguments(recipe, "model")
    trainer = mapping(recipe.get("trainer"))
    step, last = finite(progress.get("step")), finite(progress.get("max_steps"))
    state = progress.get("state")
    return _texts(
        {
            "state": {None: "no progress.json yet", "preempted": "stopped, resumable"}.get(state, state)
            if isinstance(state, str | None)
            else state,
            "why it ended": progress.get("reason"),
            "steps": f"{step:,.0f} of {last:,.0f} steps" if step is not None and last is not None else None,
            "task": task,
            "backbone": model.get("backbone"),
            "options of the backbone": _shown(model.get("backbone_options")),
            "attention": _shown(model.get("attention")),
            "parameters": _count(summary.get("parameters")),
            "GFLOPs per sample, forward": _scaled(summary.get("flops_per_sample"), 1e-9, "#,.4g"),
            "diffusion": _shown(model.get("diffusion")),
            "loss": _shown(model.get("loss")),
            "optimizer": _shown(model.get("optimizer")),
            "schedule": _shown(model.get("schedule")),
            "precision": trainer.get("precision"),
            "strategy": _shown(trainer.get("strategy")),
            "seed": recipe.get("seed_everything"),
        }
    )


def _costs(
    summary: Mapping[str, Any], progress: Mapping[str, Any], curves: Mapping[str, Curve]
) -> dict[str, str]:
    def median(tag: str) -> float | None:
        return statistics.median(value for _, value in curves[tag]) if curves.get(tag) else None

    data, compute = median("train/time_data"), median("train/time_compute")
    share = (
        data / (data + compute) if data is not None and compute is not None and data + compute > 0 else None
    )
    return _texts(
        {
            "training time": _duration(summary.get("seconds", progress.get("seconds"))),
            "samples/s, median": _scaled(median("train/samples_per_second"), 1, ",.1f"),
            "tokens/s, median": _scaled(median("train/tokens_per_second"), 1, ",.0f"),
            "time spent waiting for data": _scaled(share, 100, ".1f", " %"),
            "tokens/s per GPU, median": _scaled(median("train/tokens_per_second_per_gpu"), 1, ",.0f"),
            "MFU, median": _scaled(median("train/mfu"), 100, ".1f", " %"),
            "peak memory of the process": _scaled(summary.get("peak_memory_bytes"), 1e-6, ",.0f", " MB"),
            "GPU memory allocated, peak": _scaled(
                _most(curves, "train/memory_allocated_gib"), 1, ".2f", " GiB"
            ),
            "GPU memory reserved, peak": _scaled(
                _most(curves, "train/memory_reserved_gib"), 1, ".2f", " GiB"
            ),
        }
    )


def _data(
    recipe: Mapping[str, Any],
    progress: Mapping[str, Any],
    state: Mapping[str, Any],
    curves: Mapping[str, Curve],
) -> dict[str, str]:
    position = {**state, **mapping(state.get("data"))}
    module, data = _arguments(recipe, "data")
    return _texts(
        {
            "module": module,
            "path": data.get("path"),
            "source": _shown(data.get("source")),
            "batch size": data.get("batch_size"),
            "epoch": progress.get("epoch"),
            "samples consumed": _count(progress.get("consumed")),
            "samples that could not be decoded": _last(curves, "train/skipped"),
            "steps left out": _last(curves, "train/skipped_steps"),
            "seed of the order": position.get("seed"),
            "lanes": position.get("lanes"),
            "window": position.get("window"),
            "hash of the training data": position.get("data_hash"),
            "hash of the validation data": position.get("val_hash"),
            "newest checkpoint": progress.get("last_checkpoint"),
        }
    )


def _environment(environment: Mapping[str, Any], progress: Mapping[str, Any]) -> dict[str, str]:
    command = environment.get("command")
    versions = mapping(environment.get("versions"))
    return _texts(
        {
            "host": environment.get("host"),
            "CPU cores": environment.get("cpus"),
            **{f"version of {name}": value for name, value in list(versions.items())[:40]},
            "command": " ".join(map(str, command)) if isinstance(command, list) else command,
            "hash of the recipe": environment.get("recipe_hash"),
        }
    )


def _arguments(recipe: Mapping[str, Any], section: str) -> tuple[str, dict[str, Any]]:
    """Return the name of the class and the arguments of a section, `model` or `data`."""
    values = mapping(recipe.get(section))
    return str(values.get("class_path", "")).rpartition(".")[2], mapping(values.get("init_args"))


def _shown(value: Any) -> str | None:
    """Return a value of a recipe in one line: `mhla, blocks 2`."""
    if not isinstance(value, dict):
        return None if value is None else _text(value)
    shown = (
        _text(item) if key == "name" else f"{key} {_text(item)}"
        for key, item in value.items()
        if item is not None
    )
    return ", ".join(shown) or None


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    """Return the values that are known, as texts."""
    return {name: _text(value) for name, value in values.items() if value not in (None, "")}


def _text(value: Any) -> str:
    """Return a value in one line, cut where it is long."""
    if isinstance(value, str):
        return value if len(value) <= _MOST_VALUE else f"{value[:_MOST_VALUE]}…"
    text = ""
    # piece by piece: references of YAML can make a value that is endless as a text
    for piece in json.JSONEncoder(ensure_ascii=False, default=str).iterencode(value):
        text += piece
        if len(text) > _MOST_VALUE:
            return f"{text[:_MOST_VALUE]}…"
    return text


def _count(value: Any) -> str | None:
    return _scaled(value, 1, ",.0f")


def _scaled(value: Any, factor: float, form: str, unit: str = "") -> str | None:
    number = finite(value)
    return None if number is None else f"{number * factor:{form}}{unit}"


def _most(curves: Mapping[str, Curve], tag: str) -> float | None:
    return max((value for _, value in curves.get(tag, [])), default=None)


def _last(curves: Mapping[str, Curve], tag: str) -> str | None:
    return _count(curves[tag][-1][1]) if curves.get(tag) else None


def _duration(value: Any) -> str | None:
    """Return seconds as hours, minutes and seconds."""
    seconds = finite(value)
    if seconds is None:
        return None
    hours, rest = divmod(round(seconds), 3600)
    return (
        f"{hours} h {rest // 60:02d} min"
        if hours
        else f"{rest // 60} min {rest % 60:02d} s"
        if rest >= 60
        else f"{seconds:.1f} s"
    )
