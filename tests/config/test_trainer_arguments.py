"""The table of Lightning's Trainer arguments: complete, shown in the guide, and what a recipe may say."""

from __future__ import annotations

import inspect
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch.callbacks as lightning_callbacks
import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from lightning.pytorch.cli import LightningArgumentParser

from mhla_lightning.config.checks import check_keys
from mhla_lightning.config.quick_checks import check_names
from mhla_lightning.config.recipes import apply_overrides, load_recipe
from mhla_lightning.config.trainer_arguments import (
    ARGUMENTS,
    CALLBACKS,
    as_markdown,
    check_arguments,
    check_built,
    seconds_of,
)
from tests.helpers.errors import refused

SIGNATURE = inspect.signature(Trainer).parameters
GUIDE = Path(__file__).parents[2] / "docs" / "trainer-arguments.md"
IMAGES = "classification/deit_tiny_mhla_mnist_cpu"

CSV = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "logs"}}

SWEEP: dict[str, tuple[list[Any], list[Any]]] = {  # argument -> values that pass, values that are refused
    "accelerator": (["cpu", "gpu", "auto"], []),
    "strategy": (["ddp", "zero2"], []),  # judged by strategies.config
    "devices": ([1, 2, "auto", [0, 1]], []),
    "num_nodes": ([1, 2], []),
    "precision": (
        ["32-true", "bf16-mixed", "bf16-true", "16-mixed", "16-true", "64-true", "32", 32, 16, "bf16"],
        ["transformer-engine", "transformer-engine-float16", "bf8", 8, True],
    ),
    "logger": ([[], [CSV], CSV], [True, False, ["csv"], "csv", {"save_dir": "logs"}]),
    "callbacks": ([[], [{"class_path": "mhla_lightning.callbacks.EMA"}]], []),
    "fast_dev_run": ([False, 0], [True, 1, 3]),
    "max_epochs": ([-1], [1, 10]),
    "min_epochs": ([0], [1, 10]),
    "max_steps": ([1, 10**6, -1], [0, -2, 1.5, 1e3, True, "many"]),
    "min_steps": ([0, 5], [-1, 2.5, True]),
    "max_time": (["00:00:00:01", {"hours": 1}], ["1h", 60, "00:00:00:00", {"hours": 0}, {"years": 1}]),
    "limit_train_batches": ([1.0], [1, 4, 0, 0.5, 0.0, "4"]),
    "limit_val_batches": ([0, 1, 20, 0.0, 0.5, 1.0], [-1, 1.5, -0.5, True, "1"]),
    "limit_test_batches": ([0, 1, 20, 0.0, 0.5, 1.0], [-1, 1.5, -0.5, True, "1"]),
    "limit_predict_batches": ([1.0], [1, 0.5]),
    "overfit_batches": ([0, 0.0], [1, 0.1, 1.0]),
    "val_check_interval": ([1, 500], [0, -1, 0.25, 1.0, True, "00:00:10:00", {"minutes": 10}]),
    "check_val_every_n_epoch": ([1], [0, 2, -1]),
    "num_sanity_val_steps": ([0, 2, -1], [-2, 0.5, True]),
    "log_every_n_steps": ([0, 1, 50], [-1, 0.5, True]),
    "enable_checkpointing": ([True], [False]),
    "enable_progress_bar": ([True, False], []),
    "enable_model_summary": ([True, False], []),
    "accumulate_grad_batches": ([1], [2, 0, {"0": 4}]),
    "gradient_clip_val": ([0, 1, 0.5, float("inf")], [-1, -0.5, float("nan"), True, "1"]),
    "gradient_clip_algorithm": ([], ["norm", "value", "max"]),  # alone it clips nothing
    "deterministic": ([True, False, "warn"], []),
    "benchmark": ([True, False], []),
    "inference_mode": ([True, False], []),
    "use_distributed_sampler": ([True, False], []),
    "profiler": (["simple", "advanced", "pytorch"], []),
    "detect_anomaly": ([True, False], []),
    "barebones": ([False], [True]),
    "plugins": ([[]], [{"class_path": "lightning.pytorch.plugins.io.AsyncCheckpointIO"}, ["x"]]),
    "sync_batchnorm": ([True, False], []),
    "reload_dataloaders_every_n_epochs": ([0], [1, 5]),
    "default_root_dir": ([], ["/tmp/x"]),
    "enable_autolog_hparams": ([True, False], []),
    "model_registry": ([], ["mine"]),
}


def test_every_argument_of_the_installed_lightning_is_in_the_table() -> None:
    """A new argument must be judged before that Lightning is used."""
    assert list(ARGUMENTS) == list(SWEEP) == list(SIGNATURE)


def test_every_callback_of_the_installed_lightning_is_in_the_table() -> None:
    assert set(CALLBACKS) == set(lightning_callbacks.__all__)


@pytest.mark.parametrize("name", SIGNATURE)
def test_what_a_recipe_may_say(name: str) -> None:
    good, bad = SWEEP[name]
    check_arguments({name: None})
    check_arguments({name: SIGNATURE[name].default})
    for value in good:
        check_arguments({name: value})
    for value in bad:
        with refused(f"trainer.{name}") as error:
            check_arguments({name: value})
        found = value["class_path"] if isinstance(value, dict) and "class_path" in value else str(value)
        assert found in error.value.reason
    if ARGUMENTS[name].handling != "works":
        assert bad, "what is refused is refused by its name"


def test_the_guide_shows_the_table() -> None:
    assert as_markdown() in GUIDE.read_text()


@pytest.mark.parametrize(
    "name", sorted(name for name, rule in CALLBACKS.items() if rule.handling == "refused")
)
@pytest.mark.parametrize("single", [True, False], ids=["single", "list"])
def test_a_callback_that_cannot_work_is_refused_by_its_place(name: str, single: bool) -> None:
    """Before torch is imported, and again with the imported classes."""
    entry = {"class_path": f"lightning.pytorch.callbacks.{name}"}
    given: Any = entry if single else [{"class_path": "mhla_lightning.callbacks.EMA"}, entry]
    values = apply_overrides(load_recipe(IMAGES).values, {"trainer.callbacks": given})
    for check in (check_names, check_keys):
        with refused("trainer.callbacks" if single else "trainer.callbacks.1") as error:
            check(values)
        assert name in error.value.reason


def test_a_class_derived_from_a_refused_one_is_refused_too() -> None:
    class Mine(ModelCheckpoint):
        """Somebody's own."""

    with refused("trainer.callbacks.1") as error:
        check_built([lightning_callbacks.ModelSummary(), Mine()])
    assert "ModelCheckpoint" in error.value.reason
    with refused("trainer.callbacks"):
        check_built(Timer())
    check_built([lightning_callbacks.EarlyStopping("val/loss")])
    check_built(None)


EARLY = "lightning.pytorch.callbacks.EarlyStopping"


@pytest.mark.parametrize(
    ("trainer", "arguments", "key"),
    [
        ({"val_check_interval": 5}, {"check_on_train_epoch_end": True}, ".check_on_train_epoch_end"),
        ({}, {}, ""),
        ({"val_check_interval": 5, "limit_val_batches": 0}, {}, ""),
    ],
    ids=["end of epochs", "no interval", "no validation"],
)
def test_early_stopping_that_would_never_act_is_refused(
    trainer: dict[str, Any], arguments: dict[str, Any], key: str
) -> None:
    entry = {"class_path": EARLY, "init_args": {"monitor": "val/loss", **arguments}}
    with refused(f"trainer.callbacks.0{key}"):
        check_arguments({**trainer, "callbacks": [entry]})
    entry["init_args"] = {"monitor": "val/loss", "check_on_train_epoch_end": False}
    check_arguments({"val_check_interval": 5, "callbacks": [entry]})


def test_clipping_needs_a_limit() -> None:
    for algorithm in ("norm", "value"):
        check_arguments({"gradient_clip_val": 1.0, "gradient_clip_algorithm": algorithm})
    with refused("trainer.gradient_clip_algorithm"):
        check_arguments({"gradient_clip_val": 1.0, "gradient_clip_algorithm": "max"})


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        ("00:00:00:01", 1),
        ("01:02:03:04", 86400 + 2 * 3600 + 3 * 60 + 4),
        ("100:00:00:00", 8640000),
        ({"hours": 1, "minutes": 30}, 5400),
        ({"seconds": 0.5}, 0.5),
        (timedelta(minutes=2), 120),
    ],
)
def test_the_seconds_of_a_duration(given: Any, seconds: float) -> None:
    assert seconds_of(given) == seconds


@pytest.mark.parametrize(
    "given", ["1:2", "-1:00:00:00", 3600, {"hours": "one"}, {"hours": -1}, {}, [1], True]
)
def test_what_is_no_duration(given: Any) -> None:
    with refused("trainer.max_time"):
        seconds_of(given)


def test_every_default_of_a_resolved_recipe_can_be_given_again() -> None:
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_lightning_class_args(Trainer, "trainer", subclass_mode=False)
    shown = parser.get_defaults().trainer
    assert set(vars(shown)) == set(SIGNATURE)
    check_arguments(vars(shown))
