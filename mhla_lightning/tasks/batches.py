"""Batches of any loader, with the entries that every step reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor

from mhla_lightning.errors import UserError

Stage = Literal["train", "evaluate", "predict"]
_ALWAYS = ("index", "epoch", "weight", "key")
FIRST = 8
"""Reads of labels on a GPU in a task's life; each makes the host wait."""
_MOST = 2**20  # samples of a batch, so that no two samples have one index


def is_complete(batch: Any) -> bool:
    """Return whether a batch has what the steps read besides its samples."""
    return isinstance(batch, Mapping) and all(name in batch for name in _ALWAYS)


def named(batch: Any, names: Sequence[str]) -> dict[str, Any]:
    """Return a batch as a mapping.

    Args:
        batch: a mapping, a tensor, or a tuple or list of tensors.
        names: of the tensors where the batch gives none, in order.

    Raises:
        UserError: anything else, or more tensors than names.
    """
    if isinstance(batch, Mapping):
        return dict(batch)
    parts = [batch] if isinstance(batch, Tensor) else batch
    if not isinstance(parts, tuple | list) or not 0 < len(parts) <= len(names):
        raise UserError("batch", f"it is {shown(batch)}; give a mapping or a tuple of {', '.join(names)}")
    return dict(zip(names, parts, strict=False))


def entry(batch: Mapping[str, Any], name: str, shape: Sequence[int | None], kind: str, values: str) -> Tensor:
    """Return a tensor of a batch.

    Args:
        batch: of a loader.
        name: of the entry.
        shape: wanted; None is any size.
        kind: `float`, `int64`.
        values: what the entry holds, for the message.

    Raises:
        UserError: the entry is missing, or has another type or shape; says what is wanted.
    """
    sizes = ", ".join("any" if size is None else str(size) for size in shape)
    wanted = f"a step needs `{name}`, {values}: a {kind} tensor of shape ({sizes})"
    value = batch.get(name)
    if value is None:
        raise UserError(f"batch.{name}", f"the batch has only {', '.join(map(str, batch))}; {wanted}")
    fits = isinstance(value, Tensor) and (
        value.is_floating_point() if kind == "float" else value.dtype == torch.int64
    )
    if not fits or len(value.shape) != len(shape):
        raise UserError(f"batch.{name}", f"it is {shown(value)}; {wanted}")
    if any(size not in (None, found) for size, found in zip(shape, value.shape, strict=True)):
        raise UserError(f"batch.{name}", f"it is {shown(value)}; {wanted}")
    return value


@dataclass
class LabelChecks:
    """Checks every label on the host, and on a GPU those of the first batches.

    Reading them makes the host wait. A wrong one that comes later ends in CUDA's own assertion.

    Attributes:
        left: reads on a GPU that are still to come.
    """

    left: int = FIRST

    def within(self, labels: Tensor, classes: int, key: str, ignored: int | None = None) -> None:
        """Refuse labels that are no class of the model.

        Args:
            labels: int64, of any shape.
            classes: of the model.
            key: of the error.
            ignored: a label that is no class and fits all the same; None is none.

        Raises:
            UserError: a label outside 0 to classes - 1.
        """
        if labels.device.type != "cpu":
            if self.left == 0:
                return
            self.left -= 1
        _labels_within(labels if ignored is None else labels[labels != ignored], classes, key)


def _labels_within(labels: Tensor, classes: int, key: str) -> None:
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise UserError(
            key,
            f"it is {classes}, and labels of the data are from {int(labels.min())} to {int(labels.max())}; "
            f"they must be at least 0 and below {classes}",
        )


def shown(value: Any) -> str:
    """Return a value of a batch in words."""
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"


def positioned(batch: Mapping[str, Any], trainer: pl.Trainer | None, number: int) -> dict[str, Any]:
    """Return a batch with key, index, epoch and weight; what it lacks follows from its position.

    Random numbers are then those of the position: they repeat in another run with the same loader.

    Args:
        batch: holds tensors (batch, ...).
        trainer: None where there is none.
        number: of the batch in its epoch.
    """
    rank, world, epoch = 0, 1, 0
    if trainer is not None:
        rank, world = trainer.global_rank, trainer.world_size
        epoch = trainer.current_epoch if trainer.training else 0
    first = next(value for value in batch.values() if isinstance(value, Tensor))
    index = (number * world + rank) * _MOST + torch.arange(len(first))
    return {
        "key": [str(value) for value in index.tolist()],
        "index": index,
        "epoch": torch.full_like(index, epoch),
        "weight": torch.ones(len(first), device=first.device),
        "skipped": torch.tensor(0),
        **batch,
    }


def trainer_of(module: pl.LightningModule) -> pl.Trainer | None:
    """Return the Trainer that a module belongs to; None without one, also under Fabric."""
    try:
        trainer = module.trainer
    except RuntimeError:  # Lightning's way to say that there is none
        return None
    return trainer if isinstance(trainer, pl.Trainer) else None


def real_rows(batch: Mapping[str, Any]) -> Tensor:
    """Return the places of a batch that are no padding, int64."""
    return (batch["weight"] > 0).nonzero().flatten()


def keys_of(batch: Mapping[str, Any], rows: Tensor) -> list[str]:
    """Return the names of some samples of a batch."""
    return [batch["key"][row] for row in rows.tolist()]


def keys(samples: int) -> dict[str, Tensor]:
    """Return `index`, `epoch` and `weight` of an example batch."""
    return {
        "index": torch.arange(samples),
        "epoch": torch.zeros(samples, dtype=torch.int64),
        "weight": torch.ones(samples),
    }
