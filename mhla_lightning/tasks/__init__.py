"""LightningModules of the model families."""

from mhla_lightning.tasks.base import Task
from mhla_lightning.tasks.classification import ClassificationLossConfig, ClassificationTask
from mhla_lightning.tasks.diffusion import PredictSettings
from mhla_lightning.tasks.distillation import Distillation
from mhla_lightning.tasks.image_diffusion import ImageDiffusionLossConfig, ImageDiffusionTask
from mhla_lightning.tasks.language import LanguageLossConfig, LanguageTask, RecallTask
from mhla_lightning.tasks.optimization import OptimizerConfig, ScheduleConfig
from mhla_lightning.tasks.text_diffusion import TextDiffusionLossConfig, TextDiffusionTask
from mhla_lightning.tasks.text_to_image import TextToImageTask
from mhla_lightning.tasks.video_diffusion import VideoDiffusionTask

__all__ = [
    "ClassificationLossConfig",
    "ClassificationTask",
    "Distillation",
    "ImageDiffusionLossConfig",
    "ImageDiffusionTask",
    "LanguageLossConfig",
    "LanguageTask",
    "OptimizerConfig",
    "PredictSettings",
    "RecallTask",
    "ScheduleConfig",
    "Task",
    "TextDiffusionLossConfig",
    "TextDiffusionTask",
    "TextToImageTask",
    "VideoDiffusionTask",
]
