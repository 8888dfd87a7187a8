"""Scalars go to TensorBoard and, one line each, to metrics.jsonl, which compare and status read."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import TensorBoardLogger

from mhla_lightning.runs.folder import RunFolder, write_text


class RunLogger(TensorBoardLogger):
    """TensorBoardLogger that lacks a file other programs can read without TensorBoard: every scalar is also a
    line of metrics.jsonl.

    Args:
        run: the run folder.
        resume_step: step of the checkpoint that training goes on from; later lines and points of an earlier
            attempt are dropped.

    Attributes:
        optimizer_steps: gives the x axis, optimizer steps done; set once the trainer stands.
    """

    def __init__(self, run: RunFolder, resume_step: int = 0) -> None:
        super().__init__(
            save_dir=run.tensorboard,
            name="",
            version="",
            default_hp_metric=False,
            purge_step=resume_step + 1 if resume_step else None,
        )
        self._file = run.metrics
        self._resume_step = resume_step
        self.optimizer_steps: Callable[[], int] | None = None

    @rank_zero_only
    def start(self) -> None:
        """Drops what an earlier attempt logged after the checkpoint (`resume_step`)."""
        keep_until(self._file, self._resume_step)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        metrics = {
            tag: value for tag, value in metrics.items() if tag != "epoch"
        }  # one endless epoch: says nothing
        if self.optimizer_steps is not None:  # Lightning counts one less in validation than in training
            step = self.optimizer_steps()
        super().log_metrics(metrics, step)
        with self._file.open("a") as file:
            file.writelines(
                json.dumps({"step": step, "tag": tag, "value": float(value)}) + "\n"
                for tag, value in metrics.items()
            )


def keep_until(metrics: Path, step: int) -> None:
    """Keeps the lines of metrics.jsonl up to `step`; a last line cut by a kill goes too."""
    if not metrics.is_file():
        return
    kept = [
        line
        for line in metrics.read_text().splitlines()
        if _step_of(line) is not None and _step_of(line) <= step
    ]  # type: ignore[operator]
    write_text(metrics, "".join(line + "\n" for line in kept))


def _step_of(line: str) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None
