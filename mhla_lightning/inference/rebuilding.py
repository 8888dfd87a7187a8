"""The task and the data of a run out of its recipe.yaml, without weights and without opened shards."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

from mhla_lightning.config.recipes import read_yaml
from mhla_lightning.config.resolve import Resolved, resolve
from mhla_lightning.errors import UserError
from mhla_lightning.inference.weights import Weights
from mhla_lightning.runs.folder import RunFolder
from mhla_lightning.tasks import Task

Built = TypeVar("Built", bound=Task)
_OURS = "mhla_lightning."  # a run folder may come from a stranger, and a class path is code


def rebuild(
    folder: RunFolder,
    kind: type[Task],
    needed: str,
    change: Callable[[dict[str, Any]], dict[str, Any]] = dict,
    data: dict[str, Any] | None = None,
) -> Resolved:
    """What a run trained, with its trainer left out.

    Args:
        kind: the task that it must be.
        needed: what to say where it is another: "sampling needs ...".
        change: from the task's arguments to those that are taken.
        data: the recipe's data section; None is the run's own.

    Raises:
        UserError: another task, or data of a class that is not ours.
    """
    values = read_yaml(folder.recipe)
    model, data = values["model"], data or values["data"]
    task = _class(str(model["class_path"]))
    if not (task is not None and issubclass(task, kind) and str(data["class_path"]).startswith(_OURS)):
        raise UserError(
            f"run {folder.run_id} trains {model['class_path'].rpartition('.')[2]}; {needed} ({kind.__name__})"
        )
    gone = {
        key: None for key in ("init_from", "distill") if key in model["init_args"]
    }  # the run's own weights follow; these may not be there now
    arguments = {**model["init_args"], **gone}
    if isinstance(arguments.get("loss"), Mapping) and "distill" in arguments["loss"]:
        arguments["loss"] = {**arguments["loss"], "distill": None}
    arguments = change(arguments)
    return resolve({"trainer": {}, "model": {**model, "init_args": arguments}, "data": data})


def trains(folder: RunFolder, kind: type[Task]) -> bool:
    """Whether a run's task is of this kind."""
    task = _class(str(read_yaml(folder.recipe)["model"]["class_path"]))
    return task is not None and issubclass(task, kind)


def _class(path: str) -> type | None:
    """A class of ours; None for any other path."""
    module, _, name = path.rpartition(".")
    found = getattr(importlib.import_module(module), name, None) if module.startswith(_OURS) else None
    return found if isinstance(found, type) else None


def load_backbone(task: Built, weights: Weights, device: torch.device | str) -> Built:
    """The task with its weights, in eval mode, on `device`.

    Raises:
        UserError: weights of another model.
    """
    task.configure_model()
    assert task.backbone is not None
    weights.load(task.backbone)
    return task.to(device).eval().requires_grad_(False)
