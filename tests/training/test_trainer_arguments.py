"""Arguments of Lightning's Trainer that work in a run change nothing that they should not."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mhla_lightning.runs.folder import RunFolder, read_metrics
from mhla_lightning.training.launch import RunOptions, launch
from tests.helpers.errors import refused
from tests.helpers.images import TINY_RECIPE

LIGHTNING = "lightning.pytorch.callbacks"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plain")


@pytest.fixture(scope="module")
def plain(shards: Path, folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The curves of six steps without further arguments; the run is below `folder`."""
    (folder / "tiny.yaml").write_text(TINY_RECIPE.replace("PATH", str(shards)))
    return curves(folder / "tiny.yaml", folder)


def curves(recipe: Path, root: Path, name: str = "r", **trainer: Any) -> dict[str, list[tuple[int, float]]]:
    """Train six steps; return every curve that does not measure time."""
    overrides = {f"trainer.{key}": value for key, value in {"max_steps": 6, **trainer}.items()}
    assert launch(str(recipe), overrides, RunOptions(runs=str(root / "runs"), run_id=name)) == 0
    series = read_metrics(RunFolder(root / "runs" / name).metrics)
    return {tag: values for tag, values in series.items() if "per_second" not in tag and "time_" not in tag}


HARMLESS: dict[str, Any] = {
    "deterministic": True,
    "benchmark": False,
    "inference_mode": False,
    "detect_anomaly": True,
    "sync_batchnorm": True,
    "enable_autolog_hparams": False,
    "enable_model_summary": True,
    "num_sanity_val_steps": -1,
    "min_steps": 3,
    "profiler": "simple",
}
DEFAULTS: dict[str, Any] = {  # of Lightning
    "limit_train_batches": 1.0,
    "overfit_batches": 0.0,
    "accumulate_grad_batches": 1,
    "use_distributed_sampler": True,
    "reload_dataloaders_every_n_epochs": 0,
    "check_val_every_n_epoch": 1,
    "fast_dev_run": False,
}


@pytest.fixture
def indeterminate() -> Iterator[None]:
    """Torch's global settings are as before after the test."""
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("indeterminate")
@pytest.mark.filterwarnings("ignore:.*detect_anomaly.*", "ignore:Anomaly Detection has been enabled")
def test_what_is_trained_stays(
    recipe: Path, tmp_path: Path, plain: dict[str, list[tuple[int, float]]]
) -> None:
    assert curves(recipe, tmp_path, **HARMLESS) == plain


def test_the_environment_changes_nothing(
    recipe: Path,
    tmp_path: Path,
    plain: dict[str, list[tuple[int, float]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Lightning takes arguments that are not passed from PL_TRAINER_..., which no recipe shows."""
    monkeypatch.setenv("PL_TRAINER_LIMIT_TRAIN_BATCHES", "2")
    monkeypatch.setenv("PL_TRAINER_GRADIENT_CLIP_VAL", "0.001")
    assert curves(recipe, tmp_path, **DEFAULTS) == plain


def test_the_recipe_of_a_run_is_a_recipe(
    folder: Path, tmp_path: Path, plain: dict[str, list[tuple[int, float]]]
) -> None:
    """It shows every default of Lightning."""
    assert curves(folder / "runs" / "r" / "recipe.yaml", tmp_path) == plain


def test_curves_of_training_can_be_left_out(
    recipe: Path, tmp_path: Path, plain: dict[str, list[tuple[int, float]]]
) -> None:
    found = curves(recipe, tmp_path, log_every_n_steps=0)
    assert found == {tag: values for tag, values in plain.items() if tag.startswith("val")}
    assert found


def test_an_interval_above_the_end_validates_at_the_end(recipe: Path, tmp_path: Path) -> None:
    found = curves(recipe, tmp_path, val_check_interval=500)
    assert [step for step, _ in found["val/loss"]] == [6]


def test_validation_can_be_limited_and_left_out(
    recipe: Path, tmp_path: Path, plain: dict[str, list[tuple[int, float]]]
) -> None:
    """One of the two batches holds 16 of the 20 samples."""
    training = {tag: values for tag, values in plain.items() if tag.startswith("train")}
    one = curves(recipe, tmp_path, "one", limit_val_batches=1)
    assert {tag: one[tag] for tag in training} == training
    assert all(value * 16 == round(value * 16) for _, value in one["val/top1"])
    assert curves(recipe, tmp_path, "none", limit_val_batches=0) == training


def test_callbacks_of_lightning_that_work(
    recipe: Path, tmp_path: Path, plain: dict[str, list[tuple[int, float]]]
) -> None:
    names = ("LearningRateMonitor", "DeviceStatsMonitor", "ModelSummary", "TQDMProgressBar")
    average = {"class_path": "mhla_lightning.callbacks.EMA", "init_args": {"decay": 0.9}}
    found = curves(
        recipe, tmp_path, callbacks=[average, *({"class_path": f"{LIGHTNING}.{name}"} for name in names)]
    )
    assert {tag: found[tag] for tag in plain} == plain
    assert any(tag.startswith("DeviceStatsMonitor") for tag in found)
    rates = next(values for tag, values in found.items() if tag.startswith("lr-"))
    assert len(rates) == 6


@pytest.mark.parametrize("precision", ["16-mixed", "16-true", 16])
def test_float16_on_a_cpu_is_no_bfloat16(recipe: Path, tmp_path: Path, precision: str | int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with refused("trainer.precision") as error:
            curves(recipe, tmp_path, precision=precision)
    assert "bf16-mixed" in error.value.reason


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_other_precisions_train_on_a_cpu(
    recipe: Path, tmp_path: Path, plain: dict[str, list[tuple[int, float]]], precision: str
) -> None:
    found = curves(recipe, tmp_path, precision=precision)
    assert [value for _, value in found["train/loss"]] == pytest.approx(
        [value for _, value in plain["train/loss"]], rel=0.05
    )
    written = yaml.safe_load((tmp_path / "runs" / "r" / "recipe.yaml").read_text())
    assert written["trainer"]["precision"] == precision


def test_a_callback_with_wrong_arguments_is_one_sentence(recipe: Path, tmp_path: Path) -> None:
    """Lightning's own error is no TypeError."""
    entry = {"class_path": f"{LIGHTNING}.EarlyStopping", "init_args": {"monitor": "val/loss", "mode": "up"}}
    with refused("trainer.callbacks.0"):
        curves(recipe, tmp_path, callbacks=[entry])
