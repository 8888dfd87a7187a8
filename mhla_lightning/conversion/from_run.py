"""The model of a run, to be exported: weights, options, and what its card tells."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mhla_lightning.conversion.formats.base import TrainedModel
from mhla_lightning.conversion.formats.card import Record
from mhla_lightning.data import ImageDataModule
from mhla_lightning.errors import UserError
from mhla_lightning.inference.loading import find_task, keeps_tokenizer, kept_tokenizer
from mhla_lightning.inference.rebuilding import rebuild, trains
from mhla_lightning.inference.weights import find_weights
from mhla_lightning.runs.classes import kept_classes
from mhla_lightning.runs.folder import RunFolder, read_object
from mhla_lightning.tasks import ClassificationTask, LanguageTask, Task


def trained_model(
    folder: RunFolder, ckpt: str | None = None, ema: bool = True, tokenizer: bool = False
) -> TrainedModel:
    """Return the model of a run; its weights are read when they are used.

    Args:
        folder: the run.
        ckpt: a step or a checkpoint folder; None means the newest.
        ema: take the averaged weights where the checkpoint has them.
        tokenizer: open the tokenizer of a language model, too.

    Raises:
        UserError: no such checkpoint, or a recipe that may not be rebuilt.
    """
    task, beside = _rebuilt(folder, tokenizer)
    weights = find_weights(folder, ckpt, ema=ema)
    source = (
        f"run {folder.run_id} {weights.checkpoint.name} ({'averaged' if weights.averaged else 'raw'} weights)"
    )
    return TrainedModel(
        weights.open(),
        task.backbone_name,
        task.attention,
        task.backbone_options,
        source,
        record=_record(folder),
        averaged=weights.averaged,
        **beside,
    )


def _rebuilt(folder: RunFolder, tokenizer: bool) -> tuple[Task, dict[str, Any]]:
    """Return the task without weights, and the fields that some formats add.

    These are the tokenizer of a language model, or the classes of a classifier and the preprocessing of its
    images.
    """
    if trains(folder, LanguageTask):
        found = kept_tokenizer(folder) if tokenizer and keeps_tokenizer(folder) else None
        return find_task(folder), {"end": found.end, "tokenizer": found} if found else {}
    needed = "only a task that trains a backbone can be exported"
    built = rebuild(folder, Task, needed)  # type: ignore[type-abstract]  # any subclass
    task, beside = built.task, dict[str, Any]()
    if isinstance(built.data, ImageDataModule):
        beside["pixels"] = built.data.augmentation.for_timm()
    if isinstance(task, ClassificationTask):
        beside["classes"] = kept_classes(folder.path, task.num_classes)
    return task, beside


def _record(folder: RunFolder) -> Record:
    """Return what a card tells of a run; folders of this machine are named by their last part."""
    command = read_object(folder.environment).get("command")
    words = [str(word) for word in command[1:]] if isinstance(command, list) else []
    recipe = Path(words[1]).stem if len(words) > 1 and words[0] == "run" else None
    last = read_object(folder.summary).get("last")
    numbers = {
        str(tag): float(value)
        for tag, value in (last.items() if isinstance(last, Mapping) else ())
        if isinstance(value, int | float)
    }
    return Record(recipe, _data(folder), numbers, f"mhla {_without_folders(words)}" if words else None)


def _data(folder: RunFolder) -> str | None:
    """Return the data module of a recipe, and the last part of its path."""
    from mhla_lightning.config.recipes import read_run_recipe

    try:
        data = read_run_recipe(folder)["data"]
        path = (data.get("init_args") or {}).get("path")
        module = str(data["class_path"]).rpartition(".")[2]
    except (UserError, KeyError, AttributeError):
        return None
    return f"`{module}`" if path is None else f"`{module}` of `{Path(str(path)).name}`"


def _without_folders(words: list[str]) -> str:
    """Return a command without the folders of this machine."""
    shown: list[str] = []
    for word in words:
        key, equals, value = word.partition("=")
        path = (value or key).strip("\"'")
        short = Path(path).name if path.startswith("/") else (value or key)
        shown.append(f"{key}={short}" if equals else short)
    return shlex.join(shown)
