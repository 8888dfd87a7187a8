"""Multi-Head Linear Attention (arXiv 2601.07832) on Lightning.

One registry of attention operators, four model families, data in shards, results in TensorBoard.
Names of the table below are imported at their first use, so that `import mhla_lightning` stays fast.

    import mhla_lightning as mhla

    summary = mhla.run("classification/deit_tiny_mhla_mnist_cpu", {"trainer.max_steps": 50})
"""

from __future__ import annotations

import sys
from importlib import import_module

TYPE_CHECKING = False  # as typing's, whose import takes longer than all of this file
if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec

    from mhla_lightning.api import (
        AttentionNumbers,
        ComparisonTable,
        Continued,
        ExportedWeights,
        Prediction,
        RunStopped,
        RunSummary,
        Samples,
        analyze,
        compare_recipe,
        export,
        generate,
        predict,
        run,
        sample,
    )
    from mhla_lightning.api import compare_recipe as compare
    from mhla_lightning.attention import (
        Attention,
        CausalAttention,
        SelfAttention,
        build_attention,
        register_attention,
    )
    from mhla_lightning.backbones import build_backbone, register_backbone
    from mhla_lightning.callbacks import (
        EMA,
        AttentionCurves,
        Checkpoint,
        Health,
        MixingHeatmaps,
        Monitor,
        ProjectMixing,
        SampleClips,
        SampleGrids,
        SampleLog,
    )
    from mhla_lightning.callbacks.default import default_callbacks
    from mhla_lightning.data import (
        CaptionedImageDataModule,
        ClipDataModule,
        ImageDataModule,
        LatentDataModule,
        ReadingConfig,
        TextEncoding,
        TokenDataModule,
    )
    from mhla_lightning.errors import UserError
    from mhla_lightning.tasks import (
        ClassificationTask,
        ImageDiffusionTask,
        LanguageTask,
        OptimizerConfig,
        RecallTask,
        ScheduleConfig,
        Task,
        TextToImageTask,
        VideoDiffusionTask,
    )

__version__ = "0.2.0"

__all__ = [
    "EMA",
    "Attention",
    "AttentionCurves",
    "AttentionNumbers",
    "CaptionedImageDataModule",
    "CausalAttention",
    "Checkpoint",
    "ClassificationTask",
    "ClipDataModule",
    "ComparisonTable",
    "Continued",
    "ExportedWeights",
    "Health",
    "ImageDataModule",
    "ImageDiffusionTask",
    "LanguageTask",
    "LatentDataModule",
    "MixingHeatmaps",
    "Monitor",
    "OptimizerConfig",
    "Prediction",
    "ProjectMixing",
    "ReadingConfig",
    "RecallTask",
    "RunStopped",
    "RunSummary",
    "SampleClips",
    "SampleGrids",
    "SampleLog",
    "Samples",
    "ScheduleConfig",
    "SelfAttention",
    "Task",
    "TextEncoding",
    "TextToImageTask",
    "TokenDataModule",
    "UserError",
    "VideoDiffusionTask",
    "analyze",
    "build_attention",
    "build_backbone",
    "compare",
    "compare_recipe",
    "default_callbacks",
    "export",
    "generate",
    "predict",
    "register_attention",
    "register_backbone",
    "run",
    "sample",
]

_ROOMS = {
    "api": (
        *("AttentionNumbers", "ComparisonTable", "Continued", "ExportedWeights", "Prediction"),
        *("RunStopped", "RunSummary", "Samples", "analyze"),
        *("compare_recipe", "export", "generate", "predict", "run", "sample"),
    ),
    "attention": (
        *("Attention", "CausalAttention", "SelfAttention", "build_attention", "register_attention"),
    ),
    "backbones": ("build_backbone", "register_backbone"),
    "callbacks": (
        *("EMA", "AttentionCurves", "Checkpoint", "Health", "MixingHeatmaps", "Monitor", "ProjectMixing"),
        *("SampleClips", "SampleGrids", "SampleLog"),
    ),
    "callbacks.default": ("default_callbacks",),
    "data": (
        *("CaptionedImageDataModule", "ClipDataModule", "ImageDataModule", "LatentDataModule"),
        *("ReadingConfig", "TextEncoding", "TokenDataModule"),
    ),
    "errors": ("UserError",),
    "tasks": (
        *("ClassificationTask", "ImageDiffusionTask", "LanguageTask", "RecallTask", "Task"),
        *("OptimizerConfig", "ScheduleConfig", "TextToImageTask", "VideoDiffusionTask"),
    ),
}
_WHERE = {name: f"{__name__}.{room}" for room, names in _ROOMS.items() for name in names}


if not TYPE_CHECKING:  # a checker would take every name for one of ours

    def __getattr__(name: str) -> object:
        """Import a public name at its first use."""
        if name == "compare":  # a package, which can be called
            return import_module(f"{__name__}.compare")
        if name in _WHERE:
            return getattr(import_module(_WHERE[name]), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_STRATEGIES = "lightning.pytorch.strategies"  # the module with Lightning's registry


class _AtImport:
    """A finder that acts once, when Lightning's strategies are imported."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != _STRATEGIES:
            return None
        sys.meta_path.remove(self)
        return import_module("mhla_lightning.strategies.registering").entering(name)


def _register_strategies() -> None:
    """Make `L.Trainer(strategy="zero2")` work, whichever package is imported first."""
    if _STRATEGIES in sys.modules:
        import_module("mhla_lightning.strategies.registering").enter(sys.modules[_STRATEGIES])
    elif not any(isinstance(finder, _AtImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AtImport())


_register_strategies()
