"""Trained weights out of a run folder: which checkpoint, averaged or as trained."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mhla_lightning.checkpoints import average
from mhla_lightning.checkpoints.source import FILE, open_source
from mhla_lightning.errors import UserError
from mhla_lightning.runs.folder import FORMAT, RunFolder, complete_checkpoints, step_folder
from mhla_lightning.weights.rank_files import FOLDER, RankFileReader, holds_rank_files
from mhla_lightning.weights.stored import Stored, open_safetensors


@dataclass(frozen=True)
class Weights:
    """What is loaded.

    Attributes:
        checkpoint: a complete checkpoint folder.
        averaged: whether the weights are the average (callbacks.EMA).
    """

    checkpoint: Path
    averaged: bool

    @property
    def path(self) -> Path:
        """The file that is loaded, or the folder where every rank wrote one."""
        folder = self.checkpoint / (average.FOLDER if self.averaged else FOLDER)
        if holds_rank_files(folder):
            return folder
        return folder / average.WHOLE if self.averaged else self.checkpoint / FILE

    def files(self) -> list[Path]:
        """The files that are loaded."""
        return sorted(self.path.iterdir()) if self.path.is_dir() else [self.path]

    def open(self) -> Stored:
        """The backbone's tensors by its own names, on disk until they are asked for.

        Raises:
            UserError: damaged files.
        """
        if not self.averaged:
            return open_source(self.checkpoint / FILE).weights().within("backbone.")
        return (
            RankFileReader(self.path).weights()
            if self.path.is_dir()
            else open_safetensors(self.path, "the average")
        )

    def read(self) -> dict[str, Tensor]:
        """The backbone's tensors by its own names. Raises UserError for damaged files."""
        return dict(self.open())

    def load(self, backbone: nn.Module) -> None:
        """Puts the weights into a backbone.

        Raises:
            UserError: weights of another model.
        """
        missing, unexpected = backbone.load_state_dict(self.read(), strict=False)
        own = backbone.state_dict()
        missing = [name for name in missing if own[name].is_floating_point()]  # an average holds nothing else
        if missing or unexpected:
            names = ", ".join([*missing, *unexpected][:4])
            raise UserError(
                f"{self.path} does not fit the recipe beside it: {len(missing)} weights missing, "
                f"{len(unexpected)} left over ({names})"
            )


@dataclass(frozen=True)
class FoundRun:
    """A run that was found and checked; no weights are loaded yet.

    Attributes:
        run: the folder.
        weights: of its newest checkpoint, or of the one that was asked for.
    """

    run: RunFolder
    weights: Weights

    @property
    def checkpoint(self) -> Path:
        """The checkpoint folder."""
        return self.weights.checkpoint

    @property
    def averaged(self) -> bool:
        """Whether the weights are the average."""
        return self.weights.averaged

    def identity(self) -> dict[str, Any]:
        """Tells these weights from all others, without reading them."""
        facts = [file.stat() for file in self.weights.files()]
        file = f"{sum(fact.st_size for fact in facts)}-{max(fact.st_mtime_ns for fact in facts)}"
        return {
            "format": FORMAT,
            "run": self.run.run_id,
            "checkpoint": self.checkpoint.name,
            "averaged": self.averaged,
            "file": file,
        }


def find_weights(folder: RunFolder, ckpt: str | None, ema: bool) -> Weights:
    """Weights of a run.

    Args:
        ckpt: a step, or a checkpoint folder; None is the newest.
        ema: take the average where the checkpoint has one.

    Raises:
        UserError: no such checkpoint, or one that cannot be read here.
    """
    checkpoint = _checkpoint(folder, ckpt)
    averaged = ema and average.has_average(checkpoint)
    if not averaged and not (checkpoint / FILE).is_file():
        raise UserError(
            f"{checkpoint} holds no {FILE} that can be read here"
            + ("" if ema else "; leave out --no-ema to take the average")
        )
    return Weights(checkpoint, averaged)


def _checkpoint(folder: RunFolder, ckpt: str | None) -> Path:
    found = complete_checkpoints(folder.path)
    if ckpt is None:
        if (
            folder.path / "COMPLETE"
        ).is_file():  # a checkpoint folder holds its recipe, and so may stand for its run
            return folder.path
        if not found:
            raise UserError(f"run {folder.run_id} has no checkpoint yet")
        return found[-1]
    path = folder.checkpoints / step_folder(int(ckpt)) if ckpt.isdecimal() else Path(ckpt)
    if not (path / "COMPLETE").is_file():
        steps = ", ".join(str(int(checkpoint.name.removeprefix("step-"))) for checkpoint in found) or "none"
        raise UserError(f"--ckpt {ckpt} is no complete checkpoint; steps of run {folder.run_id}: {steps}")
    return path


def choose_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one; else any name of torch's.

    Raises:
        UserError: a device that this machine does not have.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise UserError(
            f"--device {name} cannot be used here ({str(error).splitlines()[0]}); auto takes the GPU "
            "where there is one"
        ) from error
    return device


def memory_bytes(device: torch.device) -> int:
    """All memory of a device, used or not; of the CPU, the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
