"""Tasks under a plain `L.Trainer`: what they log, and what they refuse before training."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import strategies
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.trainer.states import TrainerFn

from mhla_lightning.callbacks import Monitor
from mhla_lightning.data import ImageDataModule, ReadingConfig, TokenDataModule
from mhla_lightning.strategies.zero.strategy import ZeroStrategy
from mhla_lightning.tasks import ClassificationTask, LanguageTask
from mhla_lightning.tasks.trainers import check_strategy, run_length
from tests.helpers.errors import refused
from tests.helpers.language_runs import write_text

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*", "ignore:.*does not have many workers.*")
QUIET: dict[str, Any] = dict.fromkeys(
    ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False
)
OPTIONS = {"img_size": 8, "patch_size": 2, "embed_dim": 12, "depth": 1, "num_heads": 2}
READING = ReadingConfig(num_workers=0)


class Losses(pl.Callback):
    """Keeps what the trainer shows as `train/loss`, and the loss of every micro batch."""

    def __init__(self) -> None:
        self.shown: list[float] = []
        self.micro: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *arguments: Any) -> None:
        self.micro.append(float(arguments[1]["loss"]) * trainer.accumulate_grad_batches)

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if "train/loss" in trainer.callback_metrics:
            self.shown.append(float(trainer.callback_metrics["train/loss"]))


def fit(shards: Path, *callbacks: pl.Callback, classes: int = 4) -> pl.Trainer:
    pl.seed_everything(0, verbose=False)
    task = ClassificationTask("deit_tiny", {"name": "mhla", "blocks": 2}, OPTIONS, num_classes=classes)
    data = ImageDataModule(str(shards), 16, 8, image_size=8, reading=READING)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=2,
        accumulate_grad_batches=2,
        limit_val_batches=0,
        callbacks=list(callbacks),
        **QUIET,
    )
    trainer.fit(task, data)
    return trainer


def test_a_task_logs_the_loss_of_the_whole_batch_as_a_run_does(shards: Path) -> None:
    """Issue 20, fault 6: a plain Trainer showed no loss of training."""
    seen = Losses()
    last = fit(shards, seen).callback_metrics
    first, second = sum(seen.micro[:2]) / 2, sum(seen.micro[2:]) / 2
    assert seen.shown == pytest.approx([first, first])
    assert float(last["train/loss"]) == pytest.approx(second)
    monitored = fit(shards, Monitor(16, 16))
    assert float(monitored.callback_metrics.get("train/loss", second)) == pytest.approx(second)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"max_epochs": 2}, 8),
        ({"max_epochs": 2, "max_steps": 5}, 5),
        ({"max_epochs": 2, "limit_train_batches": 2}, 2),
        ({"max_epochs": 2, "limit_train_batches": 0.5}, 4),
    ],
    ids=str,
)
def test_the_cosine_ends_where_the_trainer_ends(shards: Path, options: dict[str, Any], steps: int) -> None:
    """Also where only epochs are given."""
    data = ImageDataModule(str(shards), 16, 8, image_size=8, reading=READING)
    trainer = pl.Trainer(accelerator="cpu", accumulate_grad_batches=2, **options, **QUIET)
    trainer.datamodule = data  # type: ignore[attr-defined]
    data.trainer = trainer
    assert run_length(trainer) == steps


def test_data_of_other_classes_is_refused_before_training(shards: Path) -> None:
    with refused("model.num_classes"):
        fit(shards, classes=3)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


def test_bits_per_byte_need_no_check(text: Path) -> None:
    """Issue 20, fault 6: only the command's check gave the bytes of the tokens."""
    options = {"context": 32, "embed_dim": 16, "depth": 1, "intermediate": 32}
    task = LanguageTask("lm_tiny", {"name": "mhla", "chunk_size": 8, "max_chunks": 8, "heads": 2}, options)
    data = TokenDataModule(str(text), 8, reading=READING)
    before = {name: copy.copy(value) for name, value in vars(task).items() if not name.startswith("_")}
    task.check_data(data.facts(), 8)
    after = {name: value for name, value in vars(task).items() if not name.startswith("_")}
    assert before == after, "a check changes nothing"
    measured = pl.Trainer(accelerator="cpu", devices=1, **QUIET).validate(task, data, verbose=False)[0]
    bits = measured["val/loss"] / torch.log(torch.tensor(2.0)).item()
    assert measured["val/bits_per_byte"] == pytest.approx(bits, rel=0.2), "nearly all tokens are bytes"


@pytest.mark.parametrize("attention", ["gla", ["softmax", "mamba2"]])
def test_an_operator_for_cuda_is_refused_on_a_cpu_before_weights_exist(text: Path, attention: Any) -> None:
    options = {"context": 32, "embed_dim": 16, "depth": 2, "intermediate": 32}
    task = LanguageTask("lm_tiny", attention, options)
    with refused("model.attention.name") as caught:
        pl.Trainer(accelerator="cpu", devices=1, max_steps=1, **QUIET).fit(
            task, TokenDataModule(str(text), 8)
        )
    assert "CUDA" in caught.value.reason
    assert task.backbone is None


@pytest.mark.parametrize("name", ["FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy"])
def test_an_unknown_strategy_is_refused_by_name(name: str) -> None:
    """Issue 20, fault 7."""
    trainer: Any = SimpleNamespace(strategy=object.__new__(getattr(strategies, name)), callbacks=[])
    with refused("trainer.strategy") as caught:
        check_strategy(trainer)
    assert name in (caught.value.reason or "")


@pytest.mark.parametrize("average", [StochasticWeightAveraging(0.1), EMAWeightAveraging()], ids=type)
def test_lightnings_averages_of_split_weights_are_refused(average: pl.Callback) -> None:
    """Issue 20, fault 7."""
    split: Any = SimpleNamespace(strategy=object.__new__(ZeroStrategy), callbacks=[average])
    with refused("trainer.callbacks"):
        check_strategy(split)
    check_strategy(SimpleNamespace(strategy=object.__new__(ZeroStrategy), callbacks=[]))  # type: ignore[arg-type]
    whole: Any = SimpleNamespace(strategy=strategies.SingleDeviceStrategy(), callbacks=[average])
    check_strategy(whole)


def test_a_checkpoint_without_the_split_weights_is_refused() -> None:
    """Of a strategy of another package; ZeroStrategy saves whole files."""
    split = SimpleNamespace(
        strategy=SimpleNamespace(skipped_step=lambda: False),
        callbacks=[ModelCheckpoint()],
        state=SimpleNamespace(fn=TrainerFn.FITTING),
    )
    with refused("trainer.callbacks"):
        check_strategy(cast(pl.Trainer, split))
    split.state.fn = TrainerFn.VALIDATING
    check_strategy(cast(pl.Trainer, split))
    split.state.fn, split.strategy = TrainerFn.FITTING, object.__new__(ZeroStrategy)
    check_strategy(cast(pl.Trainer, split))
