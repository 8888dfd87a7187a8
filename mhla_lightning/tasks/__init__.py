"""LightningModules of the model families."""

from mhla_lightning.tasks.base import Task
from mhla_lightning.tasks.classification import ClassificationTask
from mhla_lightning.tasks.distillation import Distillation
from mhla_lightning.tasks.image_diffusion import ImageDiffusionTask
from mhla_lightning.tasks.language import LanguageTask, RecallTask
from mhla_lightning.tasks.optimization import OptimizerConfig, ScheduleConfig
from mhla_lightning.tasks.video_diffusion import VideoDiffusionTask

__all__ = [
    "ClassificationTask",
    "Distillation",
    "ImageDiffusionTask",
    "LanguageTask",
    "OptimizerConfig",
    "RecallTask",
    "ScheduleConfig",
    "Task",
    "VideoDiffusionTask",
]
