"""The public name of the transformers integration (`mhla_lightning.integrations`)."""

from mhla_lightning.integrations.from_run import to_hf
from mhla_lightning.integrations.transformers import (
    MHLAForCausalLM,
    MHLALanguageConfig,
    StateCache,
    language_config,
    wrap,
)
from mhla_lightning.integrations.transformers_training import (
    LORA_TARGETS,
    ProjectMixingCallback,
    parameter_groups,
    register_auto_classes,
    register_lora_targets,
)

register_auto_classes(MHLALanguageConfig, MHLAForCausalLM)
register_lora_targets(MHLALanguageConfig.model_type)

__all__ = [
    "LORA_TARGETS",
    "MHLAForCausalLM",
    "MHLALanguageConfig",
    "ProjectMixingCallback",
    "StateCache",
    "language_config",
    "parameter_groups",
    "to_hf",
    "wrap",
]
