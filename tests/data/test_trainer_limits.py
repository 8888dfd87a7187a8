"""A plain `L.Trainer` with our data modules: epochs have a length, and other samples are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import BatchSizeFinder, GradientAccumulationScheduler, ModelCheckpoint

from mhla_lightning.data import Augmentation, ImageDataModule
from tests.helpers.data_modules import build
from tests.helpers.errors import refused
from tests.helpers.probe import Probe

# Lightning 2.6.6 with torch 2.14: its own use of a deprecated pytree test, and advice.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*LeafSpec.*", "ignore:.*does not have many workers.*", "ignore:.*max_epochs.* was not set"
)
QUIET: dict[str, Any] = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)


def images(shards: Path, **options: Any) -> ImageDataModule:
    """64 training samples in steps of 16: four steps an epoch."""
    return build(
        ImageDataModule,
        path=str(shards),
        image_size=8,
        **{"batch_size": 16, "num_workers": 0} | options,
        augmentation=Augmentation(auto_augment=None, re_prob=0.0),
    )


def fit(
    shards: Path, callbacks: Any = None, data: ImageDataModule | None = None, ckpt: Any = None, **options: Any
) -> tuple[Probe, ImageDataModule, pl.Trainer]:
    model, data = Probe(), data or images(shards)
    options = {"num_sanity_val_steps": 0, "enable_checkpointing": False} | options
    trainer = pl.Trainer(accelerator="cpu", devices=1, callbacks=callbacks, **QUIET, **options)
    trainer.fit(model, data, ckpt_path=ckpt, weights_only=True)
    return model, data, trainer


@pytest.fixture(scope="module")
def sequence(shards: Path) -> list[int]:
    """The samples of 12 steps, with no border of an epoch among them."""
    data = images(shards)
    loader = iter(data.train_dataloader())
    return [index for _ in range(12) for index in next(loader)["index"].tolist()]


REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "half a step": (
        "limit_train_batches",
        {"micro": 8, "accumulate_grad_batches": 2, "limit_train_batches": 3},
    ),
    "overfit": ("overfit_batches", {"max_steps": 6, "overfit_batches": 2}),
    "overfit a share": ("overfit_batches", {"max_steps": 6, "overfit_batches": 0.5}),
    "accumulation": ("accumulate_grad_batches", {"max_steps": 6, "accumulate_grad_batches": 2}),
    "accumulation by epoch": (
        "callbacks",
        {"max_steps": 6, "callbacks": [GradientAccumulationScheduler({0: 2})]},
    ),
    "batch size": ("callbacks", {"max_steps": 6, "callbacks": [BatchSizeFinder()]}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_trainer_that_would_take_other_samples_is_refused(shards: Path, name: str) -> None:
    key, options = REFUSED[name]
    options = dict(options)
    micro = options.pop("micro", None)
    with refused(f"trainer.{key}") as caught:
        fit(shards, data=images(shards, micro_batch_size=micro), **options)
    assert caught.value.reason


# Arguments, and then steps, batches of an epoch and validations (of one batch) that follow.
EPOCHS: list[tuple[dict[str, Any], tuple[int, int, int]]] = [
    ({"max_epochs": 1}, (4, 4, 1)),
    ({"max_epochs": 2, "max_steps": 70}, (8, 4, 2)),
    ({"max_epochs": 2, "max_steps": 7}, (7, 4, 1)),
    ({"max_steps": 6}, (6, 4, 1)),
    ({"max_epochs": -1, "max_steps": 6}, (6, 4, 1)),
    ({"max_epochs": 3, "limit_train_batches": 2}, (6, 2, 3)),
    ({"max_epochs": 3, "limit_train_batches": 0.5}, (6, 2, 3)),
    ({"max_epochs": 2, "limit_train_batches": 1000}, (8, 4, 2)),
    ({"max_epochs": 3, "check_val_every_n_epoch": 2}, (12, 4, 1)),
    ({"max_epochs": 2, "val_check_interval": 2}, (8, 4, 4)),
    ({"max_epochs": 2, "val_check_interval": 0.5}, (8, 4, 4)),
    ({"max_steps": 6, "check_val_every_n_epoch": None, "val_check_interval": 3}, (6, 4, 2)),
    ({"max_epochs": 2, "reload_dataloaders_every_n_epochs": 1}, (8, 4, 2)),
    ({"max_steps": 6, "min_epochs": 2, "min_steps": 2}, (6, 4, 1)),
]


@pytest.mark.parametrize(("options", "expected"), EPOCHS, ids=str)
def test_epochs_are_parts_of_the_same_sequence(
    shards: Path, sequence: list[int], options: dict[str, Any], expected: tuple[int, int, int]
) -> None:
    """Issue 20, fault 3: an epoch has a length, ends, and is validated, whatever the trainer's limits."""
    model, data, trainer = fit(shards, **options)
    steps, batches, validations = expected
    per_pass = len(data.val_dataloader())
    assert (trainer.global_step, trainer.num_training_batches) == (steps, batches)
    assert model.validations == validations * per_pass
    assert data.consumed == len(model.indices) == 16 * steps
    assert model.indices == sequence[: 16 * steps]


def test_a_sample_left_over_is_in_the_next_epoch(shards: Path) -> None:
    model, _, trainer = fit(shards, data=images(shards, batch_size=24), max_epochs=2)
    assert (trainer.global_step, trainer.num_training_batches) == (4, 2)
    assert sorted(model.indices[:64]) == list(range(64))


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize(("stop", "workers"), [(2, 0), (4, 0), (6, 2)])
def test_a_fit_resumes_in_the_middle_and_at_the_end_of_an_epoch(
    shards: Path, sequence: list[int], tmp_path: Path, stop: int, workers: int
) -> None:
    """By Lightning's own checkpoint; an epoch of 8 micro batches ends where it would have ended."""

    def data(**options: Any) -> ImageDataModule:
        return images(shards, num_workers=workers, **options)

    first, _, _ = fit(
        shards,
        [ModelCheckpoint(tmp_path, every_n_train_steps=stop, save_top_k=-1, filename="{step}")],
        data(micro_batch_size=8),
        accumulate_grad_batches=2,
        max_steps=stop,
        max_epochs=2,
        enable_checkpointing=True,
        limit_val_batches=0,
    )
    saved = tmp_path / f"step={stop}.ckpt"
    for micro in (8, 16):  # the same number of micro batches, and another one
        second, again, trainer = fit(
            shards,
            None,
            data(micro_batch_size=micro),
            saved,
            accumulate_grad_batches=16 // micro,
            max_epochs=2,
        )
        assert (trainer.global_step, trainer.current_epoch) == (8, 2)
        assert again.consumed == 128
        assert first.indices + second.indices == sequence[:128]
        # Lightning itself validates no epoch whose last batch wrote the checkpoint.
        assert second.validations == len(again.val_dataloader()) * (2 if stop < 4 else 1)


def test_the_length_of_a_recipe_is_not_dropped_in_silence(shards: Path) -> None:
    with refused("data.epochs") as caught:
        fit(shards, data=images(shards, epochs=1.0), max_steps=9)
    assert "max_epochs" in (caught.value.reason or "")
    _, _, trainer = fit(shards, data=images(shards, epochs=1.0), max_epochs=1)
    assert trainer.global_step == 4


def test_a_development_run_takes_its_batches(shards: Path) -> None:
    model, _, _ = fit(shards, fast_dev_run=2)
    assert len(model.indices) == 32
    assert model.validations == 2
