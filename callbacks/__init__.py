"""Lightning callbacks of the platform. A recipe names them under `trainer.callbacks`; the run command adds all but EMA and SampleLog by itself."""

from mhla_lightning.callbacks.checkpoint import Checkpoint
from mhla_lightning.callbacks.ema import EMA
from mhla_lightning.callbacks.monitor import MixingHeatmaps, Monitor
from mhla_lightning.callbacks.progress import ProgressFile, StepBar
from mhla_lightning.callbacks.projection import ProjectMixing
from mhla_lightning.callbacks.samples import SampleLog

__all__ = ["EMA", "Checkpoint", "MixingHeatmaps", "Monitor", "ProgressFile", "ProjectMixing", "SampleLog", "StepBar"]
