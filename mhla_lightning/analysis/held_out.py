"""A run's model and some of its held-out samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mhla_lightning.analysis.watching import partitions
from mhla_lightning.backbones import build_backbone
from mhla_lightning.data.modules.base import ShardDataModule
from mhla_lightning.errors import UserError
from mhla_lightning.inference.rebuilding import checked, load_backbone, rebuild
from mhla_lightning.inference.weights import FoundRun, find_weights
from mhla_lightning.runs.folder import RunFolder, find_run, runs_root
from mhla_lightning.tasks import Task


@dataclass(frozen=True)
class TrainedRun(FoundRun):
    """A run to look into; its weights are not loaded yet.

    Attributes:
        task: built from recipe.yaml, without weights.
        data: its data module; a batch holds the samples that are looked at.
    """

    task: Task
    data: ShardDataModule

    def block_sizes(self) -> list[tuple[int, ...]]:
        """Return the block sizes of the layers that have blocks, on the grid of the task."""
        task = self.task
        with torch.device("meta"):
            plan = build_backbone(task.backbone_name, attention=task.attention, **task.backbone_options)
        return partitions(plan, task.grid)

    def load(self, device: torch.device) -> Task:
        """Return the task with its weights, in eval mode.

        Raises:
            UserError: the weights belong to another model.
        """
        return load_backbone(self.task, self.weights, device)

    def batch(self) -> dict[str, Any]:
        """Return the first batch of the validation split.

        Raises:
            UserError: the data is not there, or has no such split.
        """
        return dict(next(iter(self.data.val_dataloader())))


def open_run(
    run: str, samples: int, *, runs: str | None = None, ckpt: str | None = None, ema: bool = True
) -> TrainedRun:
    """Find a run, its checkpoint and its held-out data.

    Args:
        run: id or folder.
        samples: of a batch.
        runs: folder of all run folders; None means $MHLA_RUNS, else ./runs.
        ckpt: a step or a checkpoint folder; None means the newest.
        ema: take the averaged weights where the checkpoint has them.

    Raises:
        UserError: no such run or checkpoint, or a recipe that names code that may not run.
    """
    folder: RunFolder = find_run(run, runs_root(runs))
    weights = find_weights(folder, ckpt, ema)
    section = checked(folder)[0]["data"]
    arguments = {**(section.get("init_args") or {}), "batch_size": samples, "micro_batch_size": None}
    needed, data = "looking into attention needs one of ours", {**section, "init_args": arguments}
    resolved = rebuild(folder, Task, needed, data=data)  # type: ignore[type-abstract]  # compared only
    if not isinstance(resolved.data, ShardDataModule):
        raise UserError(folder.run_id, f"its data module {type(resolved.data).__name__} is none of ours")
    return TrainedRun(folder, weights, resolved.task, resolved.data)


def single_samples(batch: Mapping[str, Any], device: torch.device) -> Iterator[dict[str, Any]]:
    """Yield the real samples of a batch, each as a batch of its own, on a device.

    Args:
        batch: completed, see :meth:`Task.completed`.
        device: of the tensors.
    """
    count = len(batch["weight"])
    for row in (batch["weight"] > 0).nonzero().flatten().tolist():
        yield {name: _row(value, row, count, device) for name, value in batch.items()}


def _row(value: Any, row: int, count: int, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return (value[row : row + 1] if value.dim() and len(value) == count else value).to(device)
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == count:
        return value[row : row + 1]
    return value
