"""What `trainer.strategy` may say of ours, and DeepSpeed's configuration of a recipe. Imports neither
torch nor deepspeed.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeGuard

import yaml

from mhla_lightning.errors import UserError, unknown_name

PRESETS = Path(__file__).parent / "presets"
ZERO = ("zero1", "zero2", "zero3", "zero2_offload", "zero3_offload", "zero3_nvme")
TESTED = ("0.19", "0.20")  # DeepSpeed from, and below

StrategyEntry = str | Mapping[str, Any]
"""A preset's name, or a mapping of `name` and keys of DeepSpeed's configuration that replace the preset's."""

_FOLLOWS = {
    "train_batch_size": "data.batch_size is the one global batch",
    "train_micro_batch_size_per_gpu": "it is data.micro_batch_size",
    "gradient_accumulation_steps": "it follows from data.batch_size and data.micro_batch_size",
    "gradient_clipping": "it is trainer.gradient_clip_val",
    "bf16": "it follows from trainer.precision",
    "torch_autocast": "it follows from trainer.precision",
    "data_types": "it follows from trainer.precision",
    "optimizer": "it is model.optimizer",
    "scheduler": "it is model.schedule",
    "activation_checkpointing": "it is model.checkpoint_activations",
    "checkpoint": "the run command saves checkpoints",
}
_FREE = ("zero_optimization", "aio", "fp16", "communication_data_type", "prescale_gradients", "gradient_predivide_factor", "dump_state",
         "wall_clock_breakdown", "memory_breakdown", "comms_logger", "flops_profiler")  # fmt: skip
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "16-mixed", "16-true")
_ALIASES = {"32": "32-true", 32: "32-true", "bf16": "bf16-mixed", "16": "16-mixed", 16: "16-mixed"}


def is_zero(entry: Any) -> TypeGuard[StrategyEntry]:
    """Whether `trainer.strategy` is one of our ZeRO presets."""
    return strategy_name(entry) in ZERO


def strategy_name(entry: Any) -> str | None:
    """The name in an entry; None where it has none (nothing given, or a class_path)."""
    name = entry.get("name") if isinstance(entry, Mapping) else entry
    return name if isinstance(name, str) else None


def check_strategy(trainer: Mapping[str, Any]) -> None:
    """Refuses, before anything is built, what `trainer.strategy` cannot be. Raises UserError."""
    entry = trainer.get("strategy")
    if isinstance(entry, Mapping) and "class_path" in entry:
        return
    if isinstance(entry, Mapping) and not isinstance(entry.get("name"), str):
        raise UserError(
            f"trainer.strategy is a mapping without a name; it names one of {', '.join(ZERO)}, or "
            "has a class_path"
        )
    name = strategy_name(entry)
    if name is None:
        return
    if name.startswith("deepspeed"):
        raise UserError(
            f"trainer.strategy '{name}' is Lightning's own, for CUDA only and with pickles for "
            f"checkpoints; take one of {', '.join(ZERO)}"
        )
    if is_zero(entry):
        zero_config(entry)
        known_precision(trainer.get("precision") or "32-true")
        if trainer.get("gradient_clip_algorithm") == "value":
            raise UserError(
                f"trainer.gradient_clip_algorithm is value, and {name} clips by norm only; take norm "
                "or leave it out"
            )
    elif isinstance(entry, Mapping) or name.startswith("zero"):
        raise UserError(unknown_name("trainer.strategy", name, [*ZERO, "ddp", "auto"]))


def zero_config(entry: StrategyEntry) -> dict[str, Any]:
    """The preset with the entry's own keys in place.

    Raises:
        UserError: an unknown preset or key, or a key that the recipe says elsewhere.
    """
    name = strategy_name(entry)
    if name not in ZERO:
        raise UserError(unknown_name("trainer.strategy", str(name), ZERO))
    preset = yaml.safe_load((PRESETS / f"{name}.yaml").read_text(encoding="utf-8"))
    given = (
        {key: value for key, value in entry.items() if key != "name"} if isinstance(entry, Mapping) else {}
    )
    for key in given:
        if key in _FOLLOWS:
            raise UserError(f"trainer.strategy.{key} cannot be set: {_FOLLOWS[key]}")
        if key not in _FREE:
            raise UserError(
                unknown_name("key", f"trainer.strategy.{key}", [f"trainer.strategy.{free}" for free in _FREE])
            )
    stage = (given.get("zero_optimization") or {}).get("stage")
    if stage not in (None, preset["zero_optimization"]["stage"]):
        raise UserError(
            f"trainer.strategy.zero_optimization.stage is {stage}, and {name} is stage "
            f"{preset['zero_optimization']['stage']}"
        )
    return _merge(preset, given)


def deepspeed_config(
    entry: StrategyEntry,
    *,
    micro_batch: int,
    accumulation: int,
    gradient_clip: float | None,
    precision: str | int,
    accelerator: str,
) -> dict[str, Any]:
    """DeepSpeed's whole configuration of a run.

    Args:
        entry: `trainer.strategy`.
        micro_batch: samples a rank takes at once.
        accumulation: micro batches of one optimizer step.
        gradient_clip: largest gradient norm; None does not clip.
        precision: `trainer.precision`.
        accelerator: `cpu` or `cuda`.

    Raises:
        UserError: see :func:`zero_config`; a precision that DeepSpeed or the CPU has not.
    """
    config = zero_config(entry)
    zero = config["zero_optimization"]
    if accelerator == "cpu":  # no streams to overlap, no pages to lock
        zero["overlap_comm"] = False
        for place in ("offload_optimizer", "offload_param"):
            if place in zero:
                zero[place]["pin_memory"] = False
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": float(gradient_clip or 0.0),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**62,  # Lightning and the run folder tell the progress
        **config,
        **_precision_config(known_precision(precision), config.get("fp16"), accelerator, zero["stage"]),
    }


def known_precision(precision: str | int) -> str:
    """A precision of Lightning's that DeepSpeed has too, by its long name. Raises UserError."""
    name = _ALIASES.get(precision, precision)
    if name not in PRECISIONS:
        raise UserError(
            unknown_name("trainer.precision", str(precision), PRECISIONS, of="the zero strategies")
        )
    return str(name)


def lightning_precision(precision: str | int) -> str:
    """What Lightning is told. Its bf16-mixed under DeepSpeed is no autocast but bf16 weights and bf16
    batches; DeepSpeed's own autocast is one.
    """
    name = known_precision(precision)
    return "32-true" if name == "bf16-mixed" else name


def _precision_config(
    precision: str, fp16: Mapping[str, Any] | None, accelerator: str, stage: int
) -> dict[str, Any]:
    if precision.startswith("16"):
        if accelerator == "cpu":
            raise UserError(
                f"trainer.precision {precision} needs a GPU: DeepSpeed has no float16 on a CPU; take "
                "bf16-mixed, bf16-true or 32-true"
            )
        return {
            "fp16": {
                "initial_scale_power": 16,
                "loss_scale_window": 1000,
                "hysteresis": 2,
                "min_loss_scale": 1,
                **(fp16 or {}),
                "enabled": True,
            }
        }
    if fp16:
        raise UserError(
            f"trainer.strategy.fp16 is set and trainer.precision is {precision}; it belongs to "
            "16-mixed and 16-true"
        )
    if precision == "bf16-mixed":
        return {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
    if precision == "bf16-true":
        # At stage 1 float32 accumulation would bring another optimizer of DeepSpeed's, which keeps all
        # gradients whole in float32.
        return {
            "bf16": {"enabled": True},
            **({"data_types": {"grad_accum_dtype": "fp32"}} if stage > 1 else {}),
        }
    return {}


def check_version() -> None:
    """Refuses a DeepSpeed that these strategies were not tested with. Raises UserError."""
    try:
        found = version("deepspeed")
    except PackageNotFoundError:
        raise UserError(
            "trainer.strategy: the zero strategies need deepspeed>=0.19,<0.20, which is not installed"
        ) from None
    if not _numbers(TESTED[0]) <= _numbers(found) < _numbers(TESTED[1]):
        raise UserError(
            f"trainer.strategy: deepspeed {found} is installed; the zero strategies are tested with "
            f">={TESTED[0]},<{TESTED[1]}"
        )


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("+")[0].split(".")[:2])


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    result = deepcopy(dict(base))
    for key, value in over.items():
        result[key] = (
            _merge(result[key], value)
            if isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
            else deepcopy(value)
        )
    return result
