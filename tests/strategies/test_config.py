"""DeepSpeed's configuration out of a recipe, and what is refused. Nothing here starts a process group;
DeepSpeed itself reads every configuration.
"""

from __future__ import annotations

from typing import Any

import pytest

from mhla_lightning.config.recipes import apply_overrides
from mhla_lightning.strategies import config as module
from mhla_lightning.strategies.config import (
    WHOLE,
    ZERO,
    check_strategy,
    check_version,
    deepspeed_config,
    is_zero,
    lightning_precision,
    zero_config,
)
from tests.helpers.errors import refused


def make(entry: Any, **changes: Any) -> dict[str, Any]:
    how: dict[str, Any] = {
        "micro_batch": 4,
        "accumulation": 2,
        "gradient_clip": 1.0,
        "precision": "32-true",
        "accelerator": "cuda",
    }
    return deepspeed_config(entry, **{**how, **changes})


@pytest.mark.parametrize("accelerator", ["cpu", "cuda"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("name", ZERO)
def test_deepspeed_reads_every_preset(
    name: str, precision: str, accelerator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.config import DeepSpeedConfig

    written = make(name, precision=precision, accelerator=accelerator)
    read = DeepSpeedConfig(written)
    assert read.train_micro_batch_size_per_gpu == 4
    assert read.gradient_accumulation_steps == 2
    assert read.gradient_clipping == 1.0
    assert read.zero_config.stage == int(name[4])
    assert (read.zero_config.offload_optimizer is not None) == ("offload" in name or "nvme" in name)
    assert read.bfloat16_config.enabled == (precision == "bf16-true")
    assert read.torch_autocast_enabled == (precision == "bf16-mixed")
    assert not (accelerator == "cpu" and read.zero_config.overlap_comm)


@pytest.mark.parametrize("precision", ["16-mixed", "16-true"])
def test_float16_scales_its_loss(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.config import DeepSpeedConfig

    read = DeepSpeedConfig(make({"name": "zero2", "fp16": {"initial_scale_power": 12}}, precision=precision))
    assert read.float16_config.enabled
    assert read.float16_config.initial_scale_power == 12
    assert read.float16_config.loss_scale == 0, "0 is DeepSpeed's dynamic scale"


def test_own_keys_replace_those_of_the_preset_one_by_one() -> None:
    entry = {"name": "zero2", "zero_optimization": {"reduce_bucket_size": 7}, "wall_clock_breakdown": True}
    changed, plain = make(entry), make("zero2")
    assert changed["zero_optimization"] == {**plain["zero_optimization"], "reduce_bucket_size": 7}
    assert changed["wall_clock_breakdown"] is True
    recipe = {"trainer": {"strategy": "zero3"}}
    assert apply_overrides(recipe, {"trainer.strategy.zero_optimization.overlap_comm": False})["trainer"][
        "strategy"
    ] == {
        "name": "zero3",
        "zero_optimization": {"overlap_comm": False},
    }


def test_two_configurations_share_nothing() -> None:
    first = make("zero1")
    first["zero_optimization"]["stage"] = 9
    assert make("zero1")["zero_optimization"]["stage"] == 1


def test_mixed_precision_is_deepspeeds_own_autocast() -> None:
    assert lightning_precision("bf16-mixed") == "32-true"
    assert lightning_precision("bf16") == "32-true"
    assert lightning_precision("bf16-true") == "bf16-true"
    assert lightning_precision(32) == "32-true"


REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    ("zero4", {}, "trainer.strategy"),
    ({"zero_optimization": {}}, {}, "trainer.strategy"),
    ({"name": "ddp", "bucket": 1}, {}, "trainer.strategy"),
    ({"name": "zero2", "gradient_accumulation_steps": 4}, {}, "trainer.strategy.gradient_accumulation_steps"),
    (
        {"name": "zero2", "train_micro_batch_size_per_gpu": 4},
        {},
        "trainer.strategy.train_micro_batch_size_per_gpu",
    ),
    ({"name": "zero2", "gradient_clipping": 4}, {}, "trainer.strategy.gradient_clipping"),
    ({"name": "zero2", "bf16": {"enabled": True}}, {}, "trainer.strategy.bf16"),
    ({"name": "zero2", "optimizer": {}}, {}, "trainer.strategy.optimizer"),
    ({"name": "zero2", "zero_optimisation": {}}, {}, "trainer.strategy.zero_optimisation"),
    (
        {"name": "zero2", "zero_optimization": {"stage": 3}},
        {},
        "trainer.strategy.zero_optimization.stage",
    ),
    ("zero2", {"precision": "64-true"}, "trainer.precision"),
    ("zero2", {"gradient_clip_algorithm": "value"}, "trainer.gradient_clip_algorithm"),
]


@pytest.mark.parametrize(("entry", "trainer", "key"), REFUSED, ids=lambda value: str(value)[:40])
def test_contradictions_are_refused_in_one_sentence(entry: Any, trainer: dict[str, Any], key: str) -> None:
    with refused(key) as caught:
        check_strategy({"strategy": entry, **trainer})
    assert "\n" not in str(caught.value)


def test_float16_needs_a_gpu() -> None:
    with refused("trainer.precision"):
        make("zero2", precision="16-mixed", accelerator="cpu")
    with refused("trainer.strategy.fp16"):
        make({"name": "zero2", "fp16": {"loss_scale_window": 10}})


@pytest.mark.parametrize(
    "entry",
    [
        *WHOLE,
        None,
        {"class_path": "lightning.pytorch.strategies.DDPStrategy"},
        {
            "class_path": "lightning.pytorch.strategies.ddp.DDPStrategy",
            "init_args": {"start_method": "popen"},
        },
        {"class_path": "my.cluster.OwnStrategy"},  # judged by sharding_of once it is built
    ],
    ids=str,
)
def test_strategies_with_whole_weights_are_left_alone(entry: Any) -> None:
    check_strategy({"strategy": entry})
    assert not is_zero(entry)


@pytest.mark.parametrize(
    "entry",
    [
        "fsdp",
        "fsdp_cpu_offload",
        "fsdp_native",
        "xla",
        "xla_debug",
        "single_xla",
        "deepspeed",
        "deepspeed_stage_2",
        "deepspeed_stage_3_offload",
        "ddp_spawn",
        "ddp_fork_find_unused_parameters_true",
        "ddp_notebook",
        "hpu_parallel",
        "lightning.pytorch.strategies.FSDPStrategy",
        {"class_path": "lightning.pytorch.strategies.FSDPStrategy"},
        {"class_path": "lightning.pytorch.strategies.ModelParallelStrategy", "init_args": {}},
        {"class_path": "lightning.pytorch.strategies.DeepSpeedStrategy"},
        {"class_path": "lightning.pytorch.strategies.deepspeed.DeepSpeedStrategy"},
        {"class_path": "lightning.pytorch.strategies.XLAStrategy"},
        {"class_path": "pytorch_lightning.strategies.FSDPStrategy"},
        {"class_path": "FSDPStrategy"},
    ],
    ids=str,
)
def test_strategies_that_callbacks_cannot_read_are_refused_by_name(entry: Any) -> None:
    """The wording is the point: it names the given strategy and lists the allowed ones."""
    with refused("trainer.strategy") as caught:
        check_strategy({"strategy": entry})
    given = entry["class_path"] if isinstance(entry, dict) else entry
    assert f"'{given}'" in caught.value.reason
    assert all(name in caught.value.reason for name in ("auto", "ddp", "single_device", *ZERO))
    assert "\n" not in caught.value.reason


def test_ranks_are_started_as_processes() -> None:
    entry = {"class_path": "lightning.pytorch.strategies.DDPStrategy", "init_args": {"start_method": "spawn"}}
    with refused("trainer.strategy.init_args.start_method"):
        check_strategy({"strategy": entry})


def test_another_deepspeed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_version()
    monkeypatch.setattr(module, "version", lambda name: "0.21.3")
    with refused("trainer.strategy") as caught:
        check_version()
    assert "0.21.3" in caught.value.reason


@pytest.mark.parametrize("name", ZERO)
def test_every_line_of_a_preset_says_what_it_is(name: str) -> None:
    lines = (module.PRESETS / f"{name}.yaml").read_text().splitlines()
    assert lines[0].startswith("# ZeRO")
    values = [
        line for line in lines if ":" in line and not line.startswith("#") and not line.rstrip().endswith(":")
    ]
    assert all("  # " in line or " # " in line for line in values), [
        line for line in values if "#" not in line
    ]
    assert zero_config(name)["zero_optimization"]["stage"] == int(name[4])
