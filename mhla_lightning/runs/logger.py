"""The logger of a run: TensorBoard, and the file metrics.jsonl that other verbs read."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import TensorBoardLogger

from mhla_lightning.runs.folder import RunFolder, read_lines, write_text


class RunLogger(TensorBoardLogger):
    """Lightning's TensorBoardLogger, which also writes every scalar as a line of metrics.jsonl.

    Lightning's own writes event files only, which need TensorBoard to be read.

    Args:
        run: the run folder.
        resume_step: step of the checkpoint that training resumes from; later lines and points of an earlier
            attempt are dropped.

    Attributes:
        optimizer_steps: returns the x axis, optimizer steps done; set once the trainer is built.
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
        """Drop the lines that an earlier attempt logged after the checkpoint (`resume_step`)."""
        keep_until(self._file, self._resume_step)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        # Training is one endless epoch, so Lightning's number of it is always 0.
        metrics = {tag: value for tag, value in metrics.items() if tag != "epoch"}
        if self.optimizer_steps is not None:  # Lightning counts one less in validation than in training
            step = self.optimizer_steps()
        super().log_metrics(metrics, step)
        with self._file.open("a", encoding="utf-8") as file:
            file.writelines(
                json.dumps({"step": step, "tag": tag, "value": float(value)}) + "\n"
                for tag, value in metrics.items()
            )

    @rank_zero_only
    def finalize(self, status: str) -> None:
        try:
            super().finalize(status)
        except OSError:  # a full disk
            if status == "success":
                raise  # after a failure its own error is on its way


def keep_until(metrics: Path, step: int) -> None:
    """Keep the lines of metrics.jsonl up to a step; a last line that a kill has cut goes, too.

    Args:
        metrics: the file.
        step: optimizer steps done.
    """
    if not metrics.is_file():
        return
    kept = [row for row in read_lines(metrics) if isinstance(row.get("step"), int) and row["step"] <= step]
    write_text(metrics, "".join(json.dumps(row) + "\n" for row in kept))
