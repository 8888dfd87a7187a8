"""Build a task from its checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, TypeVar

import lightning.pytorch as pl
from torch import Tensor

from mhla_lightning.arguments.plain import required_arguments, restored_arguments
from mhla_lightning.arguments.saved import class_named, read_saved
from mhla_lightning.errors import UserError
from mhla_lightning.weights.rank_files import FOLDER, RankFileReader

log = logging.getLogger(__name__)
TASK = "task"
"""Key of a checkpoint that holds the name of the task's class."""
T = TypeVar("T", bound=pl.LightningModule)


def load_task(
    asked: type[T],
    place: Any,
    map_location: Any,
    strict: bool | None,
    trusted: bool,
    given: Mapping[str, Any],
) -> T:
    """Return the task of a checkpoint, with its weights.

    Args:
        asked: class of the task, or one above it.
        place, map_location, trusted: see arguments.saved.read_saved.
        strict: whether the names of all weights must agree; None asks the task.
        given: arguments that replace those of the checkpoint.

    Raises:
        UserError: no such checkpoint, of another class, or without arguments.
    """
    path, saved = read_saved(place, map_location, trusted)
    kind = class_named(asked, saved.get(TASK), path)
    kept = saved.get(kind.CHECKPOINT_HYPER_PARAMS_KEY, {})
    if not kept and not given and (TASK not in saved or required_arguments(kind)):
        raise UserError(
            str(path), "it holds no arguments of a task, because an earlier version wrote it; give them"
        )
    # The weights are in the checkpoint, and those of `init_from` may not exist any more.
    kept = {name: value for name, value in kept.items() if name != "init_from"}
    task = kind(**restored_arguments(kind, kept, given))
    task.configure_model()
    task.on_load_checkpoint(saved)
    rank_files, state = path.parent / FOLDER, saved.get("state_dict")
    if not state and rank_files.is_dir():
        state = dict(RankFileReader(rank_files).weights())
    if not state:
        raise UserError(str(path), f"it holds no weights, and there is no folder {FOLDER} beside it")
    wrong = task.load_state_dict(state, task.strict_loading if strict is None else strict)
    if any(wrong):
        log.warning(f"{path}: missing {wrong.missing_keys}, left over {wrong.unexpected_keys}")
    device = next((value.device for value in state.values() if isinstance(value, Tensor)), task.device)
    return task.to(device)
