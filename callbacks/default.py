"""The callbacks that a run has and a plain Trainer lacks."""

from __future__ import annotations

import lightning.pytorch as pl

from mhla_lightning.callbacks.monitor import MixingHeatmaps, Monitor
from mhla_lightning.callbacks.progress import ProgressFile


def default_callbacks() -> list[pl.Callback]:
    """Return what shows a training: curves, heat maps, and progress.json in the logger's folder.

    `L.Trainer(callbacks=[*default_callbacks(), ...])` needs no numbers: each callback takes them from the
    task and the data. They change nothing of what is trained.
    """
    return [Monitor(), MixingHeatmaps(), ProgressFile()]
