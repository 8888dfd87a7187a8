"""A log of the samples that a run has trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO, Any, cast

import lightning.pytorch as pl

from mhla_lightning.callbacks.steps import completed
from mhla_lightning.runs.folder import read_lines, write_text

FOLDER = "samples"


class SampleLog(pl.Callback):
    """Writes samples/rank-N.jsonl in the run folder, one line per batch.

    A line is `{step, epoch, index, key}`. A resumed run removes the lines after its checkpoint, so each
    sample is listed once, however often the run was stopped. It serves debugging and audits. A line costs
    about 0.1 ms, and 40 bytes per sample.
    """

    def __init__(self) -> None:
        self._file: IO[str] | None = None
        # of the first step: an attempt that fails before its end writes nothing
        self._early: list[str] = []
        self._first = 0

    def _open(self, trainer: pl.Trainer, step: int) -> None:
        folder = Path(trainer.default_root_dir, FOLDER)
        if trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            for path in folder.glob("rank-*.jsonl"):  # also of ranks that this attempt does not have
                forget_after(path, step)
        trainer.strategy.barrier()
        # closed in teardown
        self._file = open(folder / f"rank-{trainer.global_rank}.jsonl", "a", encoding="utf-8", buffering=1)  # noqa: SIM115

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        batch = completed(pl_module, batch, batch_idx)
        line = {
            "step": trainer.global_step,
            "epoch": batch["epoch"].tolist(),
            "index": batch["index"].tolist(),
            "key": batch["key"],
        }
        text = json.dumps(line) + "\n"
        if self._file is not None:
            self._file.write(text)
        else:
            self._early.append(text)
            self._first = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._file is None and trainer.global_step > self._first:
            self._open(trainer, self._first)
            cast(IO[str], self._file).writelines(self._early)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def forget_after(path: Path, step: int) -> None:
    """Keep the lines of the steps before `step`; a last line cut short by a kill is removed too."""
    kept = [row for row in read_lines(path) if isinstance(row.get("step"), int) and row["step"] < step]
    write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
