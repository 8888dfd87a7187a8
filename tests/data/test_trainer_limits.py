"""A plain `L.Trainer` with our data modules: what would train on other samples is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    StochasticWeightAveraging,
)

from mhla_lightning.data import Augmentation, ImageDataModule
from tests.helpers.data_modules import build
from tests.helpers.errors import refused
from tests.helpers.probe import Probe

# Lightning 2.6.6 with torch 2.14: its own use of a deprecated pytree test, and advice.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*LeafSpec.*", "ignore:.*does not have many workers.*", "ignore:.*max_epochs.* was not set"
)


def fit(shards: Path, callbacks: Any = None, **options: Any) -> tuple[Probe, ImageDataModule]:
    """64 training samples in steps of 16: four steps an epoch."""
    model = Probe()
    data = build(
        ImageDataModule,
        path=str(shards),
        batch_size=16,
        image_size=8,
        num_workers=0,
        augmentation=Augmentation(auto_augment=None, re_prob=0.0),
    )
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    pl.Trainer(accelerator="cpu", devices=1, callbacks=callbacks, **quiet, **options).fit(model, data)
    return model, data


REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "batches": ("limit_train_batches", {"max_steps": 6, "limit_train_batches": 2}),
    "one batch": ("limit_train_batches", {"max_steps": 6, "limit_train_batches": 1}),
    "share": ("limit_train_batches", {"max_steps": 6, "limit_train_batches": 0.5}),
    "endless": ("limit_train_batches", {"max_epochs": 2, "limit_train_batches": 2}),
    "overfit": ("overfit_batches", {"max_steps": 6, "overfit_batches": 2}),
    "overfit a share": ("overfit_batches", {"max_steps": 6, "overfit_batches": 0.5}),
    "accumulation": ("accumulate_grad_batches", {"max_steps": 6, "accumulate_grad_batches": 2}),
    "every second epoch": ("check_val_every_n_epoch", {"max_steps": 6, "check_val_every_n_epoch": 2}),
    "least epochs": ("min_epochs", {"max_steps": 6, "min_epochs": 2}),
    "least steps": ("min_epochs", {"max_steps": 6, "min_steps": 2}),
    "epochs": ("max_epochs", {"max_epochs": 2}),
    "no length": ("max_epochs", {}),
    "epochs before steps": ("max_epochs", {"max_epochs": 1, "max_steps": 6}),
    "accumulation by epoch": (
        "callbacks",
        {"max_steps": 6, "callbacks": [GradientAccumulationScheduler({0: 2})]},
    ),
    "average by epochs": (
        "callbacks",
        {"max_steps": 6, "callbacks": [StochasticWeightAveraging(0.1, swa_epoch_start=1)]},
    ),
    "batch size": ("callbacks", {"max_steps": 6, "callbacks": [BatchSizeFinder()]}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_trainer_that_would_take_other_samples_is_refused(shards: Path, name: str) -> None:
    key, options = REFUSED[name]
    with refused(f"trainer.{key}"):
        fit(shards, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"limit_train_batches": 1.0},
        {"limit_train_batches": 6},
        {"limit_train_batches": 1000},
        {"max_epochs": 2},
        {"max_epochs": -1},
        {"reload_dataloaders_every_n_epochs": 1},
        {"check_val_every_n_epoch": None, "val_check_interval": 3},
        {"check_val_every_n_epoch": 2, "limit_val_batches": 0},
        {"min_steps": 2, "min_epochs": 0},
    ],
    ids=str,
)
def test_a_trainer_that_takes_the_samples_in_order_is_not(shards: Path, options: dict[str, Any]) -> None:
    model, data = fit(shards, max_steps=6, **options)
    assert data.consumed == len(model.indices) == 96
    assert sorted(model.indices[:64]) == list(range(64)), "an epoch is a permutation"
    assert model.indices == fit(shards, max_steps=6)[0].indices


def test_a_development_run_takes_its_batches(shards: Path) -> None:
    model, _ = fit(shards, fast_dev_run=2)
    assert len(model.indices) == 32
    assert model.validations == 2
