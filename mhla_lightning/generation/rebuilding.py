"""The task and the data of a run out of its recipe.yaml, without weights and without opened shards."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from mhla_lightning.config.recipes import read_yaml
from mhla_lightning.config.resolve import Resolved, resolve
from mhla_lightning.errors import UserError
from mhla_lightning.runs.folder import RunFolder
from mhla_lightning.tasks import Task

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
    module, _, name = str(model["class_path"]).rpartition(".")
    task = getattr(importlib.import_module(module), name, None) if module.startswith(_OURS) else None
    if not (isinstance(task, type) and issubclass(task, kind) and str(data["class_path"]).startswith(_OURS)):
        raise UserError(f"run {folder.run_id} trains {name}; {needed} ({kind.__name__})")
    arguments = change({**model["init_args"], "init_from": None})  # the run's own weights follow, and what it started from may be gone
    return resolve({"trainer": {}, "model": {**model, "init_args": arguments}, "data": data})
