"""Lightning's own tools around a task: finders, averages, finetuning and others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
    Timer,
)
from lightning.pytorch.profilers import SimpleProfiler
from lightning.pytorch.tuner import Tuner
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from mhla_lightning.attention import MixingMatrix
from mhla_lightning.callbacks import EMA
from mhla_lightning.data import ImageDataModule, ReadingConfig
from mhla_lightning.tasks import ClassificationTask, OptimizerConfig, ScheduleConfig, Task
from mhla_lightning.tasks.projection import PROJECTION
from tests.helpers.errors import refused
from tests.helpers.marks import every_nth

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*LeafSpec.*", "ignore:.*does not have many workers.*", "ignore:You defined a `validation_step`"
)
QUIET: dict[str, Any] = dict.fromkeys(
    ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False
)
IMAGES, LABELS = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 4


def loader(batch_size: int = 4) -> DataLoader[Any]:
    return DataLoader(TensorDataset(IMAGES, LABELS), batch_size=batch_size)


def make_task(
    schedule: ScheduleConfig | None = None, lr: float = 1e-3, eps: float = 1e-8
) -> ClassificationTask:
    size = {"img_size": 8, "patch_size": 2, "embed_dim": 12, "depth": 1, "num_heads": 2}
    return ClassificationTask(
        "deit_tiny",
        {"name": "mhla", "blocks": 2},
        size,
        4,
        optimizer=OptimizerConfig(lr=lr, eps=eps),
        schedule=schedule,
    )


def make_trainer(tmp_path: Path, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    pl.seed_everything(0, verbose=False)
    options = {"max_epochs": 2, **QUIET, **options}
    return pl.Trainer(accelerator="cpu", default_root_dir=tmp_path, callbacks=list(callbacks), **options)


class Rates(pl.Callback):
    """Keeps the learning rate and the first sample of every step."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.keys: list[str] = []

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, number: int) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        self.keys += batch["key"][:1] if isinstance(batch, dict) else []


def expected_rates(task: Task, steps: int) -> list[float]:
    return [task.schedule_config.lr_at(step, task.lr, steps) for step in range(steps)]


def test_the_tuner_finds_a_rate_that_training_follows(shards: Path, tmp_path: Path) -> None:
    task, reading = make_task(), ReadingConfig(num_workers=0)
    data = ImageDataModule(str(shards), 16, image_size=8, reading=reading)
    first = next(iter(data.train_dataloader()))["key"][0]
    trainer = make_trainer(tmp_path, seen := Rates(), max_epochs=6)
    found = Tuner(trainer).lr_find(task, datamodule=data, num_training=20, min_lr=1e-5, max_lr=0.3)
    assert found is not None
    assert task.lr == found.suggestion() != 1e-3
    trainer.fit(task, data)
    assert seen.rates == pytest.approx(expected_rates(task, 24))
    assert seen.keys[0] == first, "the trial takes no samples from the training"
    assert Task.load_from_checkpoint(saved(trainer, tmp_path)).lr == task.lr


def saved(trainer: pl.Trainer, folder: Path) -> Path:
    trainer.save_checkpoint(folder / "saved.ckpt")
    return folder / "saved.ckpt"


def test_the_finder_as_a_callback_changes_the_schedule_too(tmp_path: Path) -> None:
    task = make_task(ScheduleConfig(warmup_steps=2))
    finder = LearningRateFinder(num_training_steps=20, min_lr=1e-5, max_lr=0.3)
    trainer = make_trainer(tmp_path, finder, seen := Rates(), max_epochs=6)
    trainer.fit(task, loader())
    assert task.lr != 1e-3
    assert seen.rates == pytest.approx(expected_rates(task, 24))


class OwnData(pl.LightningDataModule):
    """A data module of a user's own."""

    batch_size = 2

    def train_dataloader(self) -> DataLoader[Any]:
        return loader(self.batch_size)

    val_dataloader = train_dataloader


def test_the_batch_size_finder_works_with_a_data_module_of_others(tmp_path: Path) -> None:
    data = OwnData()
    finder = BatchSizeFinder(steps_per_trial=1, max_trials=2, init_val=2)
    trainer = make_trainer(tmp_path, finder, max_epochs=1)
    trainer.fit(make_task(), data)
    assert data.batch_size > 2
    assert trainer.global_step == 16 // data.batch_size


@pytest.mark.parametrize("monitor", every_nth(["val_ema/loss", "val/loss", "train/loss"], 3))
def test_early_stopping_sees_the_tasks_numbers(monitor: str, tmp_path: Path) -> None:
    stop = EarlyStopping(monitor, patience=1, stopping_threshold=1e9, check_on_train_epoch_end=True)
    trainer = make_trainer(tmp_path, EMA(0.5), stop, max_epochs=5)
    trainer.fit(make_task(), loader(), loader())
    assert trainer.current_epoch == 1


def test_stochastic_averaging_needs_weights(tmp_path: Path) -> None:
    """It averaged a copy without weights, and changed nothing."""
    task = make_task(ScheduleConfig("constant"))
    with refused("trainer.callbacks"):
        make_trainer(tmp_path, StochasticWeightAveraging(1e-3, 1)).fit(task, loader())


@pytest.mark.filterwarnings("ignore:SWA is currently", "ignore:Swapping scheduler")
def test_stochastic_averaging_averages(tmp_path: Path) -> None:
    class Ends(pl.Callback):
        ends: list[dict[str, Tensor]] = []

        def on_train_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
            self.ends.append({name: value.detach().clone() for name, value in module.named_parameters()})

    task = make_task(ScheduleConfig("constant"))
    task.configure_model()
    average = StochasticWeightAveraging(1e-2, swa_epoch_start=2, annealing_epochs=1)
    make_trainer(tmp_path, average, ends := Ends(), max_epochs=3).fit(task, loader())
    for name, value in task.named_parameters():
        torch.testing.assert_close(value, (ends.ends[0][name] + ends.ends[1][name]) / 2)
    for part in task.modules():
        if isinstance(part, MixingMatrix):
            assert 0 <= part.weight.min().item() <= part.weight.max().item() <= 1


class Thaw(BaseFinetuning):
    """Trains the head, and the blocks from the second epoch on."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.backbone.blocks)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.backbone.blocks, optimizer, lr=1e-4)


def test_finetuning_thaws_with_its_own_rate(tmp_path: Path) -> None:
    class Watch(Rates):
        blocks: list[Tensor] = []

        def on_train_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
            self.blocks.append(next(iter(module.backbone.blocks.parameters())).detach().clone())

    task = make_task(ScheduleConfig("constant"))
    task.configure_model()
    before = next(iter(task.backbone.blocks.parameters())).detach().clone()  # type: ignore[union-attr]
    trainer = make_trainer(tmp_path, Thaw(), watch := Watch())
    trainer.fit(task, loader())
    assert torch.equal(watch.blocks[0], before)
    assert not torch.equal(watch.blocks[1], before)
    assert [group["lr"] for group in trainer.optimizers[0].param_groups][-1] == pytest.approx(1e-4)


def test_a_timer_a_profiler_and_a_dry_run(tmp_path: Path) -> None:
    profiler, timer = SimpleProfiler(), Timer(duration={"hours": 1})
    trainer = make_trainer(tmp_path, EMA(0.5), timer, profiler=profiler, fast_dev_run=2)
    trainer.fit(make_task(), loader(), loader())
    assert trainer.global_step == 2
    assert timer.time_elapsed() > 0
    assert len(profiler.recorded_durations[PROJECTION]) == 2


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("precision", ["16-true", "bf16-true"])
def test_a_checkpoint_of_half_precision_resumes(tmp_path: Path, precision: Any) -> None:
    """Two epochs at once, or one and its checkpoint, with the average of the weights."""
    constant, half = (
        ScheduleConfig("constant"),
        {"16-true": torch.float16, "bf16-true": torch.bfloat16}[precision],
    )
    whole, cut, resumed = (make_task(constant, eps=1e-4) for _ in range(3))
    keeper, kept = ModelCheckpoint(tmp_path / "kept", save_last=True), tmp_path / "kept" / "last.ckpt"
    make_trainer(tmp_path, EMA(0.5), precision=precision).fit(whole, loader())
    options = {"precision": precision, "enable_checkpointing": True, "max_epochs": 1}
    make_trainer(tmp_path, EMA(0.5), keeper, **options).fit(cut, loader())
    loaded = zip(Task.load_from_checkpoint(kept).parameters(), cut.parameters(), strict=True)
    assert all(torch.equal(one.to(half), other) for one, other in loaded)
    again = ModelCheckpoint(tmp_path / "kept", save_last=True)
    make_trainer(tmp_path, EMA(0.5), again, **options | {"max_epochs": 2}).fit(
        resumed, loader(), ckpt_path=kept
    )
    assert {weight.dtype for weight in resumed.parameters()} == {half}
    pairs = zip(whole.parameters(), resumed.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_float16_with_an_eps_of_zero_is_refused(tmp_path: Path) -> None:
    """AdamW's default of 1e-8 is 0 in float16: the first step made all weights NaN."""
    with refused("trainer.precision"):
        make_trainer(tmp_path, precision="16-true").fit(make_task(), loader())
    make_trainer(tmp_path, precision="bf16-true", max_steps=1).fit(make_task(), loader())


def test_accumulation_takes_the_steps_of_larger_batches(tmp_path: Path) -> None:
    weights = []
    for size, accumulation in ((8, 1), (4, 2)):
        task = make_task()
        trainer = make_trainer(tmp_path, seen := Rates(), max_epochs=1, accumulate_grad_batches=accumulation)
        trainer.fit(task, loader(size))
        assert trainer.global_step == 2
        assert seen.rates[::accumulation] == pytest.approx(expected_rates(task, 2))
        weights.append(torch.cat([value.detach().flatten() for value in task.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-5)
