"""The public name of the transformers integration (`mhla_lightning.integrations`)."""

from mhla_lightning.integrations.from_run import to_hf
from mhla_lightning.integrations.transformers import (
    MHLAForCausalLM,
    MHLALanguageConfig,
    StateCache,
    language_config,
    wrap,
)

__all__ = ["MHLAForCausalLM", "MHLALanguageConfig", "StateCache", "language_config", "to_hf", "wrap"]
