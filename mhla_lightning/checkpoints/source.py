"""Weights and optimizer state of a checkpoint by name, whole or in stretches.

All strategies write checkpoints that are read here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import is_zipfile

import torch
from torch import Tensor

from mhla_lightning.errors import UserError
from mhla_lightning.finite import not_finite
from mhla_lightning.weights.moments import GROUPS
from mhla_lightning.weights.rank_files import FOLDER, WEIGHT, RankFileReader
from mhla_lightning.weights.stored import Stored, as_stored

FILE = "trainer.ckpt"


class CheckpointSource(ABC):
    """Weights and optimizer state of a checkpoint.

    Args:
        path: of Lightning's file in the folder.
        checkpoint: Lightning's dict. Under `optimizer_groups` it holds, for each group, its settings and
            `names`, its parameters in order.
    """

    def __init__(self, path: Path, checkpoint: Mapping[str, Any]) -> None:
        self.path, self.checkpoint = path, checkpoint

    @property
    def step(self) -> int:
        return int(self.checkpoint["global_step"])

    @property
    def groups(self) -> Sequence[Mapping[str, Any]]:
        """Return the settings and names of the optimizer's groups."""
        return self.checkpoint.get(GROUPS, ())

    @abstractmethod
    def names(self) -> list[str]:
        """Return the names of the tensors of the module's state."""

    @abstractmethod
    def weights(self) -> Stored:
        """Return all tensors of the module's state, which are read one at a time."""

    @abstractmethod
    def kinds(self, name: str) -> list[str]:
        """Return the names of the optimizer's tensors of a weight: `exp_avg`, `exp_avg_sq`."""

    @abstractmethod
    def scalars(self, name: str) -> Mapping[str, float]:
        """Return the optimizer's single numbers of a weight: `step`."""

    @abstractmethod
    def whole(self, name: str, kind: str = WEIGHT) -> Tensor:
        """Return a tensor in its shape."""

    def read(self, name: str, kind: str, start: int, numel: int) -> Tensor:
        """Return a flat stretch of a tensor."""
        return self.whole(name, kind).reshape(-1)[start : start + numel]

    def restored(self, name: str, kind: str = WEIGHT, start: int = 0, numel: int | None = None) -> Tensor:
        """Return a tensor, or a flat stretch of it, that training goes on with.

        Raises:
            UserError: a weight that is not finite, or NaN in the optimizer's state.
        """
        value = self.whole(name, kind) if numel is None else self.read(name, kind, start, numel)
        found = not_finite(value)
        if found and (kind == WEIGHT or found == "NaN"):
            of = "" if kind == WEIGHT else f"{kind} of "
            raise UserError(
                str(self.path),
                f"{of}{name} holds {found}, so every further step would be NaN; take an earlier checkpoint",
            )
        return value

    def check(self) -> None:
        """Check every tensor that training goes on with. Raises UserError as :meth:`restored` does."""
        for name in self.names():
            self.restored(name)
            for kind in self.kinds(name):
                self.restored(name, kind)


class WholeSource(CheckpointSource):
    """Lightning's own file: one device, or DDP."""

    def names(self) -> list[str]:
        return list(self.checkpoint["state_dict"])

    def weights(self) -> Stored:
        return as_stored(self.checkpoint["state_dict"])

    @cached_property
    def _states(self) -> dict[str, Mapping[str, Tensor]]:
        states = (
            self.checkpoint["optimizer_states"][0]["state"] if self.checkpoint.get("optimizer_states") else {}
        )
        names = [name for group in self.groups for name in group["names"]]
        return {name: states[index] for index, name in enumerate(names) if index in states}

    def kinds(self, name: str) -> list[str]:
        return [key for key, value in self._states.get(name, {}).items() if value.ndim]

    def scalars(self, name: str) -> Mapping[str, float]:
        return {key: value.item() for key, value in self._states.get(name, {}).items() if not value.ndim}

    def whole(self, name: str, kind: str = WEIGHT) -> Tensor:
        return self.checkpoint["state_dict"][name] if kind == WEIGHT else self._states[name][kind]


class ShardedSource(CheckpointSource):
    """The rank files beside Lightning's file."""

    def __init__(self, path: Path, checkpoint: Mapping[str, Any], reader: RankFileReader) -> None:
        super().__init__(path, checkpoint)
        self.reader = reader

    def names(self) -> list[str]:
        return self.reader.names()

    def weights(self) -> Stored:
        return self.reader.weights()

    def kinds(self, name: str) -> list[str]:
        return [kind for kind in self.reader.kinds[name] if kind != WEIGHT]

    def scalars(self, name: str) -> Mapping[str, float]:
        return self.reader.scalars.get(name, {})

    def whole(self, name: str, kind: str = WEIGHT) -> Tensor:
        return self.reader.whole(name, kind)

    def read(self, name: str, kind: str, start: int, numel: int) -> Tensor:
        return self.reader.read(name, kind, start, numel)

    def as_whole(self) -> dict[str, Any]:
        """Return the checkpoint as Lightning's own file would hold it."""
        state = {name: self.whole(name) for name in self.names()}
        states: dict[int, dict[str, Tensor]] = {}
        groups: list[dict[str, Any]] = []
        for group in self.groups:
            first = len(states)
            for name in group["names"]:
                scalars = {
                    key: torch.tensor(value, dtype=torch.float32) for key, value in self.scalars(name).items()
                }
                states[len(states)] = scalars | {kind: self.whole(name, kind) for kind in self.kinds(name)}
            settings = {key: value for key, value in group.items() if key != "names"}
            groups.append({**settings, "params": list(range(first, len(states)))})
        optimizer = {
            "state": {index: state for index, state in states.items() if state},
            "param_groups": groups,
        }
        return {**self.checkpoint, "state_dict": state, "optimizer_states": [optimizer]}


def open_source(path: Path) -> CheckpointSource:
    """Open the checkpoint behind a `trainer.ckpt`. Its tensors stay on disk until they are read.

    Raises:
        UserError: a damaged file.
    """
    try:
        if path.is_file() and not is_zipfile(path):
            raise EOFError("its end is missing")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        why = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(str(path), f"the checkpoint is damaged: {why}") from error
    except UnpicklingError as error:  # its message is a page
        raise UserError(
            str(path), "the checkpoint holds more than tensors and plain values, which is never unpickled"
        ) from error
    rank_files = path.parent / FOLDER
    if rank_files.is_dir():
        return ShardedSource(path, checkpoint, RankFileReader(rank_files))
    if not checkpoint.get("state_dict"):
        raise UserError(
            str(path), f"the checkpoint holds no weights, and there is no folder {FOLDER} beside it"
        )
    return WholeSource(path, checkpoint)
