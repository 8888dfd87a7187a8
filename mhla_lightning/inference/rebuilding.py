"""Rebuild the task and the data of a run from recipe.yaml, without weights or shards."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

from mhla_lightning.config.moved_keys import moved
from mhla_lightning.config.recipes import read_run_recipe
from mhla_lightning.config.resolve import Resolved, resolve
from mhla_lightning.errors import UserError
from mhla_lightning.inference.weights import Weights
from mhla_lightning.runs.folder import RunFolder
from mhla_lightning.tasks import Task

Built = TypeVar("Built", bound=Task)
# A run folder may come from an untrusted source, and a class path runs code: only our classes are built.
_OURS = "mhla_lightning."


def rebuild(
    folder: RunFolder,
    kind: type[Task],
    needed: str,
    change: Callable[[dict[str, Any]], dict[str, Any]] = dict,
    data: dict[str, Any] | None = None,
) -> Resolved:
    """Build the task and the data module of a run, without a trainer.

    Args:
        folder: the run.
        kind: class that the task must have.
        needed: reason for the error when the task has another class: "sampling needs ...".
        change: maps the task's arguments to those that are used.
        data: the recipe's data section; None means the run's own.

    Raises:
        UserError: the task has another class, or the data module is not ours.
    """
    values = moved(read_run_recipe(folder))  # an earlier version may have written it
    model, data = values["model"], data or values["data"]
    task = _class(str(model["class_path"]))
    if not (task is not None and issubclass(task, kind) and str(data["class_path"]).startswith(_OURS)):
        raise UserError(
            folder.run_id, f"trains {model['class_path'].rpartition('.')[2]}; {needed} ({kind.__name__})"
        )
    # The run's own weights replace those of other files, which may not exist any more.
    arguments = dict(model["init_args"])
    if "compile" in arguments:  # every new length and size would compile again
        arguments["compile"] = None
    if "init_from" in arguments:
        arguments["init_from"] = None
    if isinstance(arguments.get("loss"), Mapping) and "distill" in arguments["loss"]:
        arguments["loss"] = {**arguments["loss"], "distill": None}
    arguments = change(arguments)
    return resolve({"trainer": {}, "model": {**model, "init_args": arguments}, "data": data})


def trains(folder: RunFolder, kind: type[Task]) -> bool:
    """Return whether a run's task is of this class."""
    task = _class(str(read_run_recipe(folder)["model"]["class_path"]))
    return task is not None and issubclass(task, kind)


def _class(path: str) -> type | None:
    """Return a class of ours by its path; None for any other path."""
    module, _, name = path.rpartition(".")
    found = getattr(importlib.import_module(module), name, None) if module.startswith(_OURS) else None
    return found if isinstance(found, type) else None


def load_backbone(task: Built, weights: Weights, device: torch.device | str) -> Built:
    """Load weights into a task and return it in eval mode on `device`.

    Raises:
        UserError: the weights belong to another model.
    """
    task.configure_model()
    assert task.backbone is not None
    weights.load(task.backbone)
    return task.to(device).eval().requires_grad_(False)
