"""Auto classes, Trainer and LoRA: what they need for models with mixing matrices."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from timm.optim import param_groups_weight_decay
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from mhla_lightning.attention import MixingMatrix
from mhla_lightning.backbones.layers import mixing_weights
from mhla_lightning.errors import UserError

LORA_TARGETS = ("q_proj", "v_proj")
"""The layers that PEFT's LoRA adapts by default, as in Llama."""


class ProjectMixingCallback(TrainerCallback):
    """Projects all mixing matrices after every optimizer step of transformers' Trainer.

    Without it, weights leave their range, and a negative one can make the block normalizer 0.
    """

    def __init__(self) -> None:
        self._matrices: list[MixingMatrix] = []

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Find the matrices.

        Raises:
            UserError: DeepSpeed or FSDP, which keep other copies of the weights.
        """
        for key in ("deepspeed", "fsdp"):
            if getattr(args, key):
                raise UserError(
                    key,
                    "found one; it keeps the weights in copies that this callback does not reach; train with "
                    "`mhla run`, whose presets project them, or on whole weights",
                )
        assert model is not None
        self._matrices = [module for module in model.modules() if isinstance(module, MixingMatrix)]
        if not self._matrices:
            raise UserError("model", f"{type(model).__name__} has no mixing matrix to project")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for matrix in self._matrices:
            matrix.project_()


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return the groups of an optimizer: no weight decay on norms, biases and mixing matrices.

    Args:
        model: any model that holds our layers.
        weight_decay: of all other parameters.
    """
    groups: list[dict[str, Any]] = param_groups_weight_decay(
        model, weight_decay, no_weight_decay_list=sorted(mixing_weights(model))
    )
    return groups


def register_auto_classes(config: type[PreTrainedConfig], model: type[PreTrainedModel]) -> None:
    """Let AutoConfig and AutoModelForCausalLM find a model by its type."""
    AutoConfig.register(config.model_type, config)
    AutoModelForCausalLM.register(config, model)


def register_lora_targets(model_type: str) -> None:
    """Tell PEFT, where it is installed, which layers LoRA adapts by default."""
    if find_spec("peft") is not None:
        known = import_module("peft.utils").TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
        known.setdefault(model_type, list(LORA_TARGETS))
