"""Find the trained weights of a run folder: one checkpoint, averaged or raw."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from mhla_lightning.checkpoints import average
from mhla_lightning.checkpoints.source import FILE, open_source
from mhla_lightning.checkpoints.whole import newest_whole
from mhla_lightning.errors import UserError
from mhla_lightning.finite import check_finite
from mhla_lightning.runs.folder import FORMAT, RunFolder, complete_checkpoints, step_folder
from mhla_lightning.weights.adapted import AdaptsWeights, Geometry
from mhla_lightning.weights.rank_files import FOLDER, RankFileReader, holds_rank_files
from mhla_lightning.weights.stored import Stored, open_safetensors

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Weights:
    """The weights of one checkpoint.

    Attributes:
        checkpoint: a complete checkpoint folder.
        averaged: whether these are the averaged weights (callbacks.EMA).
    """

    checkpoint: Path
    averaged: bool

    @property
    def path(self) -> Path:
        """Return the file of weights, or the folder if every rank wrote a file."""
        folder = self.checkpoint / (average.FOLDER if self.averaged else FOLDER)
        if holds_rank_files(folder):
            return folder
        return folder / average.WHOLE if self.averaged else self.checkpoint / FILE

    def files(self) -> list[Path]:
        """Return all files of these weights."""
        return sorted(self.path.iterdir()) if self.path.is_dir() else [self.path]

    def open(self) -> Stored:
        """Open the backbone's tensors by the backbone's names; each is read when it is used.

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
        """Read the backbone's tensors by the backbone's names.

        Raises:
            UserError: damaged files.
        """
        return dict(self.open())

    def load(self, backbone: nn.Module, source: Geometry | None = None) -> None:
        """Load the weights into a backbone.

        Args:
            backbone: of the run.
            source: the geometry of the trained model, where this one has another size.

        Raises:
            UserError: the weights belong to another model, or are not finite.
        """
        state = self.read()
        check_finite(state, str(self.path))
        omitted: Collection[str] = ()
        if source is not None:
            state = adapted = cast(AdaptsWeights, backbone).adapt_state_dict(state, source)
            omitted = adapted.omitted
            for change in sorted(set(adapted.resampled.values())):
                log.info("resampled for another size: %s", change)
        missing, unexpected = backbone.load_state_dict(state, strict=False)
        own = backbone.state_dict()
        # An average holds floating-point tensors only.
        missing = [name for name in missing if own[name].is_floating_point() and name not in omitted]
        if missing or unexpected:
            names = ", ".join([*missing, *unexpected][:4])
            raise UserError(
                str(self.path),
                f"does not fit the recipe beside it: {len(missing)} weights missing, {len(unexpected)} "
                f"left over ({names})",
            )


@dataclass(frozen=True)
class FoundRun:
    """A run and its weights; both are checked, nothing is loaded.

    Attributes:
        run: the folder.
        weights: of the newest checkpoint, or of the one that was requested.
    """

    run: RunFolder
    weights: Weights

    @property
    def checkpoint(self) -> Path:
        """Return the checkpoint folder."""
        return self.weights.checkpoint

    @property
    def averaged(self) -> bool:
        """Return whether the weights are averaged."""
        return self.weights.averaged

    def identity(self) -> dict[str, Any]:
        """Return facts that identify these weights without reading them."""
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
    """Find the weights of a run.

    Args:
        folder: the run.
        ckpt: a step or a checkpoint folder; None means the newest.
        ema: take the averaged weights where the checkpoint has them.

    Raises:
        UserError: no such checkpoint, or one that cannot be read here.
    """
    checkpoint = _checkpoint(folder, ckpt)
    averaged = ema and average.has_average(checkpoint)
    if not averaged and not (checkpoint / FILE).is_file():
        raise UserError(
            str(checkpoint),
            f"holds no {FILE} that can be read here"
            + ("" if ema else "; ask for the averaged weights instead"),
        )
    return Weights(checkpoint, averaged)


def _checkpoint(folder: RunFolder, ckpt: str | None) -> Path:
    found = complete_checkpoints(folder.path)
    if ckpt is None:
        if (folder.path / "COMPLETE").is_file():  # a checkpoint folder holds a recipe and counts as a run
            return folder.path
        newest = newest_whole(folder.path, log.warning)
        if newest is None:
            raise UserError(folder.run_id, "has no checkpoint yet")
        return newest
    path = folder.checkpoints / step_folder(int(ckpt)) if ckpt.isdecimal() else Path(ckpt)
    if not (path / "COMPLETE").is_file():
        steps = ", ".join(str(int(checkpoint.name.removeprefix("step-"))) for checkpoint in found) or "none"
        raise UserError("ckpt", f"{ckpt} is no complete checkpoint; steps of run {folder.run_id}: {steps}")
    return path


def choose_device(name: str) -> torch.device:
    """Return a torch device by name.

    Args:
        name: `auto` for the GPU if there is one, else the CPU; or any device name of torch.

    Raises:
        UserError: this machine does not have the device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # `meta` holds no numbers
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise UserError(
            "device",
            f"{name} cannot be used here ({str(error).splitlines()[0]}); auto takes the GPU where there "
            "is one",
        ) from error
    return device


def memory_bytes(device: torch.device) -> int:
    """Return the total memory of a device in bytes, used or not; for the CPU, of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
