"""Rebuild the task and the data of a run from recipe.yaml, without weights or shards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import torch

from mhla_lightning.config.checks import import_class
from mhla_lightning.config.classes import check_kinds, check_packages
from mhla_lightning.config.moved_keys import moved
from mhla_lightning.config.recipes import read_run_recipe, read_yaml
from mhla_lightning.config.resolve import Resolved, resolve
from mhla_lightning.data.modules.base import ShardDataModule
from mhla_lightning.errors import UserError
from mhla_lightning.inference.weights import Weights, find_weights
from mhla_lightning.plugins import KEY, load_plugins, locations, named_modules, packages
from mhla_lightning.runs.folder import RunFolder, find_run, runs_root
from mhla_lightning.tasks import Task
from mhla_lightning.weights.adapted import Geometry

Built = TypeVar("Built", bound=Task)


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
        UserError: the task has another class, or the recipe names code that may not run; see :func:`checked`.
    """
    values, task = checked(folder, data)
    model, data = values["model"], values["data"]
    if not issubclass(task, kind):
        raise UserError(folder.run_id, f"trains {task.__name__}; {needed} ({kind.__name__})")
    arguments = change(dict(model["init_args"]))
    own = {KEY: values[KEY]} if values.get(KEY) else {}
    return resolve({**own, "trainer": {}, "model": {**model, "init_args": arguments}, "data": data})


@dataclass(frozen=True)
class OpenedRun(Generic[Built]):
    """A run, its weights, and its task and data, which are built without weights and shards."""

    folder: RunFolder
    weights: Weights
    task: Built
    data: ShardDataModule


def open_run(
    run: str,
    kind: type[Built],
    needed: str,
    runs: str | None = None,
    ckpt: str | None = None,
    ema: bool = True,
) -> OpenedRun[Built]:
    """Find a run and its checkpoint, and build its task and data.

    Args:
        run: id or folder.
        kind, needed: see :func:`rebuild`.
        runs: folder of all run folders; None means $MHLA_RUNS, else ./runs.
        ckpt: a step or a checkpoint folder; None means the newest.
        ema: take the averaged weights where the checkpoint has them.

    Raises:
        UserError: no such run or checkpoint, or see :func:`rebuild`.
    """
    folder = find_run(run, runs_root(runs))
    built = rebuild(folder, kind, needed)
    return OpenedRun(folder, find_weights(folder, ckpt, ema), cast(Built, built.task), built.data)


def trains(folder: RunFolder, kind: type[Task]) -> bool:
    """Return whether a run's task is of this class."""
    return issubclass(checked(folder)[1], kind)


def checked(folder: RunFolder, data: dict[str, Any] | None = None) -> tuple[dict[str, Any], type[Task]]:
    """Read the recipe of a run and check all classes that it names, before any of them is built.

    A run folder may come from a stranger, and a class runs code. Classes are of our package, torch,
    Lightning, installed plugins, or packages that the folder's own recipe.yaml names under `imports`.

    Args:
        folder: the run.
        data: replaces the recipe's data section; None keeps it.

    Returns:
        The recipe, and the class of its task. The plugins and the modules under `imports` are imported.

    Raises:
        UserError: a class of another package or another kind, or `imports` that are refused.
    """
    values = moved(read_run_recipe(folder))  # an earlier version may have written it
    values["model"] = _without_weights(values["model"])
    if data is not None:
        values["data"] = data
    if values.get(KEY):
        _check_imports(folder, values)
    allowed = packages(values)
    for section in ("model", "data"):
        check_packages(values[section], section, allowed)
    load_plugins(values)
    for section, kind in (("model", Task), ("data", ShardDataModule)):
        check_kinds(values[section], kind, section, allowed)
    return values, cast(type[Task], import_class(str(values["model"]["class_path"]), "model"))


def _without_weights(model: Mapping[str, Any]) -> dict[str, Any]:
    """The model section without what a rebuilt run does not need.

    The run's own weights replace those of other files, which may not exist any more.
    """
    arguments = dict(model.get("init_args") or {})
    if "compile" in arguments:  # every new length and size would compile again
        arguments["compile"] = None
    if "init_from" in arguments:
        arguments["init_from"] = None
    if "eval_sizes" in arguments:  # a task that is rebuilt for another size need not take these
        arguments["eval_sizes"] = None
    if isinstance(arguments.get("loss"), Mapping) and "distill" in arguments["loss"]:
        arguments["loss"] = {**arguments["loss"], "distill": None}
    return {**model, "init_args": arguments}


def _check_imports(folder: RunFolder, values: Mapping[str, Any]) -> None:
    """Refuse `imports` that a checkpoint names, and code that lies in the run folder itself."""
    try:
        own = read_yaml(folder.recipe)
    except UserError:
        own = None
    if not isinstance(own, Mapping) or own.get(KEY) != values[KEY]:
        raise UserError(
            str(folder.recipe),
            f"the file is damaged, and the `{KEY}` of the copy in a checkpoint are never imported; write the "
            "recipe there again",
        )
    for number, module in enumerate(named_modules(values)):
        if any(place.is_relative_to(folder.path.resolve()) for place in locations(module)):
            raise UserError(
                f"{KEY}.{number}",
                f"'{module}' is in the run folder, whose code is never imported; install its package",
            )


def load_backbone(
    task: Built, weights: Weights, device: torch.device | str, source: Geometry | None = None
) -> Built:
    """Load weights into a task and return it in eval mode on `device`.

    Args:
        task: built without weights.
        weights: of the run.
        device: for the result.
        source: the geometry of the trained model, where the task has another size.

    Raises:
        UserError: the weights belong to another model.
    """
    task.configure_model()
    assert task.backbone is not None
    weights.load(task.backbone, source)
    return task.to(device).eval().requires_grad_(False)
