"""Tasks and data modules from a checkpoint: arguments, weights, and what is refused."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import pytest
import torch

from mhla_lightning.cli.main import main
from mhla_lightning.data import ImageDataModule, OrderConfig, ReadingConfig
from mhla_lightning.data.modules.base import ShardDataModule
from mhla_lightning.runs.folder import complete_checkpoints
from mhla_lightning.tasks import (
    ClassificationLossConfig,
    ClassificationTask,
    LanguageTask,
    OptimizerConfig,
    Task,
)
from mhla_lightning.weights.rank_files import FOLDER, WEIGHT, Stretch, file_name, write_rank_file
from tests.helpers.errors import refused

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*", "ignore:.*does not have many workers.*")
OPTIONS = {"img_size": 8, "patch_size": 2, "embed_dim": 12, "depth": 1, "num_heads": 2}
QUIET: dict[str, Any] = dict.fromkeys(
    ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False
)


@dataclass(frozen=True)
class Halved(OptimizerConfig):
    """An optimizer of a user's own."""


class OwnTask(ClassificationTask):
    """A task of a user's own, with another constructor."""

    def __init__(self, width: int, lr: float = 1e-3) -> None:
        super().__init__(
            "deit_tiny", "mhla", OPTIONS | {"embed_dim": width}, 4, optimizer=OptimizerConfig(lr=lr)
        )


def run_cell(name: str) -> type[ClassificationTask]:
    """Define a class, as a notebook's cell does each time that it runs."""

    def init(self: ClassificationTask) -> None:
        ClassificationTask.__init__(self, "deit_tiny", "mhla", OPTIONS, 4)

    return type(name, (ClassificationTask,), {"__init__": init})


def make_task(**options: Any) -> ClassificationTask:
    loss = ClassificationLossConfig(label_smoothing=0.2)
    return ClassificationTask("deit_tiny", {"name": "mhla", "blocks": 2}, OPTIONS, 4, loss=loss, **options)


def save(task: Task, path: Path, data: ImageDataModule | None = None) -> Path:
    """Write a checkpoint of a task as Lightning's Trainer does."""
    task.configure_model()
    trainer = pl.Trainer(accelerator="cpu", **QUIET)
    trainer.strategy.connect(task)
    if data is not None:
        trainer.datamodule = data  # type: ignore[attr-defined]
    trainer.save_checkpoint(path)
    return path


def equal(one: Task, other: Task) -> bool:
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(
        torch.equal(value, states[1][key]) for key, value in states[0].items()
    )


def test_a_task_comes_back_with_its_arguments(tmp_path: Path) -> None:
    task = make_task(optimizer=OptimizerConfig(lr=3e-4, betas=(0.8, 0.9)), train_only=["head"])
    path = save(task, tmp_path / "own.ckpt")
    again = Task.load_from_checkpoint(path)
    assert type(again) is ClassificationTask
    assert equal(task, again)
    assert again.hparams == task.hparams
    assert again.optimizer_config == task.optimizer_config
    assert again.label_smoothing == 0.2
    assert ClassificationTask.load_from_checkpoint(path, train_only=None).train_only == []
    twin = copy.deepcopy(again)
    assert twin.hparams == again.hparams


def test_a_task_of_a_users_own_comes_back(tmp_path: Path) -> None:
    path = save(OwnTask(24, lr=5e-4), tmp_path / "own.ckpt")
    for kind in (Task, OwnTask):
        again = kind.load_from_checkpoint(path)
        assert isinstance(again, OwnTask)
        assert again.hparams == {"width": 24, "lr": 5e-4}
    assert torch.load(path, weights_only=True)["hyper_parameters"] == {"width": 24, "lr": 5e-4}


def test_an_argument_that_a_class_gained_since_must_be_given(tmp_path: Path) -> None:
    path = save(cast(Any, run_cell("Gained"))(), tmp_path / "own.ckpt")
    later: Any = type("Gained", (OwnTask,), {})
    with refused(str(path)):
        later.load_from_checkpoint(path)
    with refused("width"):
        later.load_from_checkpoint(path, lr=0.1)


def test_of_a_cell_that_ran_twice_the_last_class_is_taken(tmp_path: Path) -> None:
    first, last = run_cell("Twice"), run_cell("Twice")
    path = save(cast(Any, first)(), tmp_path / "own.ckpt")
    assert type(Task.load_from_checkpoint(path)) is last


def test_two_classes_of_one_name_are_refused(tmp_path: Path) -> None:
    path = save(cast(Any, run_cell("Ambiguous"))(), tmp_path / "own.ckpt")
    another = type("Ambiguous", (ClassificationTask,), {"__module__": "elsewhere"})
    with refused(str(path)):
        Task.load_from_checkpoint(path)
    del another


def test_what_is_no_plain_value_must_be_given(tmp_path: Path) -> None:
    path = save(make_task(optimizer=Halved(lr=0.5)), tmp_path / "own.ckpt")
    with refused("optimizer"):
        Task.load_from_checkpoint(path)
    assert Task.load_from_checkpoint(path, optimizer=Halved(lr=0.5)).optimizer_config == Halved(lr=0.5)


def test_checkpoints_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = save(make_task(), tmp_path / "own.ckpt")
    with refused(str(path)):
        LanguageTask.load_from_checkpoint(path)
    with refused(str(tmp_path / "none.ckpt")):
        Task.load_from_checkpoint(tmp_path / "none.ckpt")
    with refused("hparams_file"):
        Task.load_from_checkpoint(path, hparams_file="hparams.yaml")
    saved = torch.load(path, weights_only=True)
    torch.save({**saved, "hyper_parameters": {}}, tmp_path / "old.ckpt")
    with refused(str(tmp_path / "old.ckpt")):
        Task.load_from_checkpoint(tmp_path / "old.ckpt")
    torch.save({**saved, "state_dict": {}}, tmp_path / "empty.ckpt")
    with refused(str(tmp_path / "empty.ckpt")):
        Task.load_from_checkpoint(tmp_path / "empty.ckpt")
    torch.save({**saved, "more": Halved()}, tmp_path / "pickled.ckpt")
    with refused(str(tmp_path / "pickled.ckpt")):
        Task.load_from_checkpoint(tmp_path / "pickled.ckpt")
    assert equal(Task.load_from_checkpoint(tmp_path / "pickled.ckpt", weights_only=False), make_twin(path))
    (tmp_path / "torn.ckpt").write_bytes(path.read_bytes()[:2000])
    with refused(str(tmp_path / "torn.ckpt")):
        Task.load_from_checkpoint(tmp_path / "torn.ckpt")


def make_twin(path: Path) -> Task:
    return Task.load_from_checkpoint(path)


def test_a_checkpoint_names_no_class_that_is_imported(tmp_path: Path) -> None:
    saved = torch.load(save(make_task(), tmp_path / "own.ckpt"), weights_only=True)
    saved["task"] = "antigravity"
    saved["hyper_parameters"] |= {"_instantiator": "os.system", "_class_path": "os.system"}
    torch.save(saved, tmp_path / "strange.ckpt")
    with refused(str(tmp_path / "strange.ckpt")):
        Task.load_from_checkpoint(tmp_path / "strange.ckpt")


def test_weights_of_several_ranks_are_put_together(tmp_path: Path) -> None:
    task = make_task()
    saved = torch.load(save(task, tmp_path / "own.ckpt"), weights_only=True)
    for rank in range(2):
        parts = []
        for name, value in task.state_dict().items():
            flat, half = value.flatten(), value.numel() // 2
            part = flat[half:] if rank else flat[:half]
            parts.append(Stretch(name, tuple(value.shape), half * rank, {WEIGHT: part.contiguous()}))
        write_rank_file(
            tmp_path / FOLDER / file_name(rank, 2), [part for part in parts if len(part.tensors[WEIGHT])]
        )
    torch.save({**saved, "state_dict": {}}, tmp_path / "trainer.ckpt")
    assert equal(Task.load_from_checkpoint(tmp_path), task)


def test_a_runs_checkpoint_gives_its_task_and_data(recipe: Path, tmp_path: Path) -> None:
    assert (
        main(
            [
                "run",
                str(recipe),
                "--run-id",
                "two",
                "--trainer.max_steps",
                "2",
                "--trainer.val_check_interval",
                "2",
            ]
        )
        == 0
    )
    (checkpoint,) = complete_checkpoints(tmp_path / "runs/two")
    task = Task.load_from_checkpoint(checkpoint)
    assert isinstance(task, ClassificationTask)
    saved = torch.load(checkpoint / "trainer.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, saved[key]) for key, value in task.state_dict().items())
    data = ShardDataModule.load_from_checkpoint(checkpoint)
    assert isinstance(data, ImageDataModule)
    assert data.augmentation.scale == (0.6, 1.0)
    assert data.consumed == 32


def test_a_data_module_comes_back_at_its_position(shards: Path, tmp_path: Path) -> None:
    data = ImageDataModule(str(shards), 16, order=OrderConfig(seed=3), reading=ReadingConfig(num_workers=0))
    data.load_state_dict(data.state_dict() | {"consumed": 48})
    path = save(make_task(), tmp_path / "own.ckpt", data)
    again = ImageDataModule.load_from_checkpoint(path)
    assert again.order == data.order
    assert again.state_dict() == data.state_dict()
    assert ImageDataModule.load_from_checkpoint(path, batch_size=8).batch_size == 8
    bare = save(make_task(), tmp_path / "bare.ckpt")
    with refused(str(bare)):
        ImageDataModule.load_from_checkpoint(bare)


def test_a_task_without_weights_says_so() -> None:
    task = make_task()
    with refused(None):
        task(torch.zeros(1, 3, 8, 8))
    with refused(None):
        list(task.parameters())
    task.configure_model()
    assert task(torch.zeros(1, 3, 8, 8)).shape == (1, 4)
    assert len(list(task.parameters())) > 4


def test_a_data_module_begins_anew_with_another_trainer(shards: Path) -> None:
    """It went on where the run before had been resumed."""
    data = ImageDataModule(str(shards), 16, image_size=8, reading=ReadingConfig(num_workers=0))
    data.load_state_dict(data.state_dict() | {"consumed": 32})

    class Seen(pl.Callback):
        keys: list[str] = []

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, number: int) -> None:
            self.keys.append(batch["key"][0])

    seen = Seen()
    for _ in range(2):
        trainer = pl.Trainer(accelerator="cpu", max_steps=1, limit_val_batches=0, callbacks=[seen], **QUIET)
        trainer.fit(make_task(), data)
    new = ImageDataModule(str(shards), 16, image_size=8, reading=ReadingConfig(num_workers=0))
    assert seen.keys[1] == next(iter(new.train_dataloader()))["key"][0] != seen.keys[0]
