"""Lightning callbacks of the platform.

A recipe names AttentionCurves, EMA, SampleClips, SampleGrids and SampleLog under `trainer.callbacks`; the run
command adds the others itself.
"""

from mhla_lightning.callbacks.attention_curves import AttentionCurves
from mhla_lightning.callbacks.checkpoint import Checkpoint
from mhla_lightning.callbacks.early_end import EarlyEnd
from mhla_lightning.callbacks.ema import EMA
from mhla_lightning.callbacks.health import Health
from mhla_lightning.callbacks.monitor import MixingHeatmaps, Monitor
from mhla_lightning.callbacks.preemption import Preemption
from mhla_lightning.callbacks.progress import ProgressFile, StepBar
from mhla_lightning.callbacks.projection import ProjectMixing
from mhla_lightning.callbacks.sample_clips import SampleClips
from mhla_lightning.callbacks.sample_grids import SampleGrids
from mhla_lightning.callbacks.sample_log import SampleLog
from mhla_lightning.callbacks.steps import FirstStep

__all__ = [
    "EMA",
    "AttentionCurves",
    "Checkpoint",
    "EarlyEnd",
    "FirstStep",
    "Health",
    "MixingHeatmaps",
    "Monitor",
    "Preemption",
    "ProgressFile",
    "ProjectMixing",
    "SampleClips",
    "SampleGrids",
    "SampleLog",
    "StepBar",
]
