"""The folder in which callbacks write under a Trainer of one's own."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl

from mhla_lightning.runs.folder import RunFolder


def run_folder_of(trainer: pl.Trainer) -> RunFolder:
    """Make the folder of a trainer's logger, without one `default_root_dir`.

    Every rank calls it.

    Args:
        trainer: that has no run folder of `lightning run`.
    """
    run = RunFolder(Path(trainer.log_dir or trainer.default_root_dir))
    if trainer.is_global_zero:
        run.path.mkdir(parents=True, exist_ok=True)
    return run
