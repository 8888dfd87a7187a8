"""The values of `trainer.strategy`, and DeepSpeed's configuration. Imports no torch."""

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
# Lightning's own under which every rank holds all weights. The others of DDP's names (ddp_spawn, ddp_fork,
# ddp_notebook) start ranks out of a process that has opened its run folder already, and fail there.
WHOLE = (
    "auto",
    "ddp",
    "ddp_find_unused_parameters_false",
    "ddp_find_unused_parameters_true",
    "single_device",
)
ALLOWED = (*WHOLE, *ZERO)
TESTED = ("0.19", "0.20")  # DeepSpeed from, and below

StrategyEntry = str | Mapping[str, Any]
"""A preset's name, or a mapping of `name` and keys of DeepSpeed's configuration that replace the preset's."""

_STRATEGY = "trainer.strategy"
_WHOLE_CLASSES = ("DDPStrategy", "SingleDeviceStrategy")
_SPLIT_CLASSES = (
    "DeepSpeedStrategy",
    "FSDPStrategy",
    "ModelParallelStrategy",
    "SingleDeviceXLAStrategy",
    "XLAStrategy",
)
_LIGHTNING = ("lightning", "lightning_fabric", "pytorch_lightning")
_FOLLOWS = {
    "train_batch_size": "`data.batch_size` is the one global batch",
    "train_micro_batch_size_per_gpu": "it is `data.micro_batch_size`",
    "gradient_accumulation_steps": "it follows from `data.batch_size` and `data.micro_batch_size`",
    "gradient_clipping": "it is `trainer.gradient_clip_val`",
    "bf16": "it follows from `trainer.precision`",
    "torch_autocast": "it follows from `trainer.precision`",
    "data_types": "it follows from `trainer.precision`",
    "optimizer": "it is `model.optimizer`",
    "scheduler": "it is `model.schedule`",
    "activation_checkpointing": "it is `model.checkpoint_activations`",
    "checkpoint": "the run command saves checkpoints",
}
_FREE = (
    "zero_optimization",
    "aio",
    "fp16",
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "dump_state",
    "wall_clock_breakdown",
    "memory_breakdown",
    "comms_logger",
    "flops_profiler",
)
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "16-mixed", "16-true")
_ALIASES = {"32": "32-true", 32: "32-true", "bf16": "bf16-mixed", "16": "16-mixed", 16: "16-mixed"}


def is_zero(entry: Any) -> TypeGuard[StrategyEntry]:
    """Whether `trainer.strategy` is one of our ZeRO presets."""
    return strategy_name(entry) in ZERO


def strategy_name(entry: Any) -> str | None:
    """Return the name in an entry; None for an empty entry and for a class_path."""
    name = entry.get("name") if isinstance(entry, Mapping) else entry
    return name if isinstance(name, str) else None


def check_strategy(trainer: Mapping[str, Any]) -> None:
    """Refuse a wrong `trainer.strategy` by its name, before anything is built.

    Args:
        trainer: the recipe's section.

    Raises:
        UserError: a strategy that splits weights in another way than the presets, an unknown name, or keys
            that contradict the recipe.
    """
    entry = trainer.get("strategy")
    if isinstance(entry, Mapping) and "class_path" in entry:
        _check_class(str(entry["class_path"]), entry.get("init_args") or {})
        return
    if isinstance(entry, Mapping) and not isinstance(entry.get("name"), str):
        raise UserError(
            _STRATEGY,
            f"the mapping has no name; it needs a `name` ({', '.join(ZERO)}) or a class_path",
        )
    name = strategy_name(entry)
    if name is None:
        return
    if is_zero(entry):
        _check_zero(entry, trainer)
    elif isinstance(entry, Mapping) and name in WHOLE:
        raise UserError(_STRATEGY, f"'{name}' takes no keys here; keys go with {', '.join(ZERO)}")
    elif name not in WHOLE:
        _refuse(name)


def _check_zero(entry: StrategyEntry, trainer: Mapping[str, Any]) -> None:
    zero_config(entry)
    known_precision(trainer.get("precision") or "32-true")
    if trainer.get("gradient_clip_algorithm") == "value":
        raise UserError(
            "trainer.gradient_clip_algorithm",
            f"'value' is set, and {strategy_name(entry)} clips by norm only; take norm or leave it out",
        )


def _refuse(name: str) -> None:
    """Raise the UserError for a name that is not allowed."""
    if name.startswith(("fsdp", "xla", "single_xla", "deepspeed")) or _class_name(name) in _SPLIT_CLASSES:
        raise UserError(_STRATEGY, allowed_instead(name))
    if name.startswith("ddp_"):
        raise UserError(
            _STRATEGY,
            f"'{name}' starts its ranks inside a running Python process, which a run cannot; allowed: "
            f"{', '.join(ALLOWED)}",
        )
    raise UserError(_STRATEGY, unknown_name("strategy", name, ALLOWED))


def _check_class(path: str, arguments: Mapping[str, Any]) -> None:
    """Refuse a class by its path.

    sharding_of judges classes of other packages once they are built.
    """
    name, package = _class_name(path), path.split(".")[0]
    if name in _SPLIT_CLASSES or (package in _LIGHTNING and name not in _WHOLE_CLASSES):
        raise UserError(_STRATEGY, allowed_instead(path))
    method = arguments.get("start_method", "popen")
    if name == "DDPStrategy" and method != "popen":
        raise UserError(f"{_STRATEGY}.init_args.start_method", f"'{method}' cannot start a run; take popen")


def _class_name(path: str) -> str:
    return path.rpartition(".")[2]


def allowed_instead(given: str) -> str:
    """Return the reason for a strategy that splits weights in a way that callbacks cannot read.

    Args:
        given: its name, class or class path.
    """
    return (
        f"'{given}' is not supported: averages, projections and checkpoints cannot read the weights that it "
        f"splits; allowed: {', '.join(ALLOWED)}"
    )


def zero_config(entry: StrategyEntry) -> dict[str, Any]:
    """Return the preset with the entry's own keys in place.

    Raises:
        UserError: an unknown preset or key, or a key that follows from another key of the recipe.
    """
    name = strategy_name(entry)
    if name not in ZERO:
        raise UserError(_STRATEGY, unknown_name("preset", str(name), ZERO))
    preset = yaml.safe_load((PRESETS / f"{name}.yaml").read_text(encoding="utf-8"))
    given = (
        {key: value for key, value in entry.items() if key != "name"} if isinstance(entry, Mapping) else {}
    )
    for key in given:
        if key in _FOLLOWS:
            raise UserError(f"{_STRATEGY}.{key}", f"the key cannot be set: {_FOLLOWS[key]}")
        if key not in _FREE:
            raise UserError(f"{_STRATEGY}.{key}", unknown_name("key", key, _FREE))
    stage = (given.get("zero_optimization") or {}).get("stage")
    own = preset["zero_optimization"]["stage"]
    if stage not in (None, own):
        raise UserError(f"{_STRATEGY}.zero_optimization.stage", f"{stage} is set, and {name} is stage {own}")
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
    """Return DeepSpeed's whole configuration of a run.

    Args:
        entry: `trainer.strategy`.
        micro_batch: samples that a rank takes at once.
        accumulation: micro batches of one optimizer step.
        gradient_clip: largest gradient norm; None does not clip.
        precision: `trainer.precision`.
        accelerator: `cpu` or `cuda`.

    Raises:
        UserError: see :func:`zero_config`; a precision that DeepSpeed or the CPU does not support.
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
        "steps_per_print": 2**62,  # Lightning and the run folder show the progress
        **config,
        **_precision_config(known_precision(precision), config.get("fp16"), accelerator, zero["stage"]),
    }


def known_precision(precision: str | int) -> str:
    """Return the long name of a precision that Lightning and DeepSpeed both have.

    Raises:
        UserError: another precision.
    """
    name = _ALIASES.get(precision, precision)
    if name not in PRECISIONS:
        raise UserError(
            "trainer.precision",
            unknown_name("precision", str(precision), PRECISIONS, of="the zero strategies"),
        )
    return str(name)


def lightning_precision(precision: str | int) -> str:
    """Return the precision for Lightning's Trainer.

    Lightning's bf16-mixed under DeepSpeed means bf16 weights and bf16 batches, without autocast. DeepSpeed
    has an autocast of its own, so Lightning gets 32-true.
    """
    name = known_precision(precision)
    return "32-true" if name == "bf16-mixed" else name


def _precision_config(
    precision: str, fp16: Mapping[str, Any] | None, accelerator: str, stage: int
) -> dict[str, Any]:
    if precision.startswith("16"):
        if accelerator == "cpu":
            raise UserError(
                "trainer.precision",
                f"{precision} needs a GPU: DeepSpeed has no float16 on a CPU; take bf16-mixed, bf16-true or "
                "32-true",
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
            f"{_STRATEGY}.fp16",
            f"the key belongs to 16-mixed and 16-true, and `trainer.precision` is {precision}",
        )
    if precision == "bf16-mixed":
        return {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
    if precision == "bf16-true":
        # At stage 1 float32 accumulation selects another optimizer of DeepSpeed, which keeps all gradients
        # whole in float32.
        return {
            "bf16": {"enabled": True},
            **({"data_types": {"grad_accum_dtype": "fp32"}} if stage > 1 else {}),
        }
    return {}


def check_version() -> None:
    """Refuse a DeepSpeed that these strategies were not tested with.

    Raises:
        UserError: no DeepSpeed, or another version.
    """
    needed = f">={TESTED[0]},<{TESTED[1]}"
    try:
        found = version("deepspeed")
    except PackageNotFoundError:
        raise UserError(
            _STRATEGY, f"the zero strategies need deepspeed{needed}, which is not installed"
        ) from None
    if not _numbers(TESTED[0]) <= _numbers(found) < _numbers(TESTED[1]):
        raise UserError(
            _STRATEGY, f"deepspeed {found} is installed; the zero strategies are tested with {needed}"
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
