"""A resume with a changed recipe takes every setting from the recipe, and keeps moments and position."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from mhla_lightning.checkpoints.source import open_source
from mhla_lightning.cli.main import main
from mhla_lightning.data import ImageDataModule
from mhla_lightning.runs.folder import read_metrics
from mhla_lightning.tasks import ClassificationTask
from mhla_lightning.tasks.optimization import OptimizerConfig, ScheduleConfig
from tests.helpers.errors import refused
from tests.helpers.images import TINY_RECIPE

Settings = list[dict[str, Any]]


def rate(step: int, peak: float, warmup: int, least: float, last: int, start: float = 1e-6) -> float:
    """Linear warm-up, then a cosine, written down anew."""
    if step < warmup:
        return start + (peak - start) * step / warmup
    return least + (peak - least) * (1 + math.cos(math.pi * (step - warmup) / (last - warmup))) / 2


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """The settings of every group at every step of AdamW."""
    steps: list[Settings] = []
    step = torch.optim.AdamW.step

    def recorded(self: Any, closure: Any = None) -> Any:
        steps.append([{key: group[key] for key in group if key != "params"} for group in self.param_groups])
        return step(self, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    return steps


@pytest.fixture(scope="module")
def finished(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe file beside `runs/r`, trained for 12 steps."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "tiny.yaml").write_text(TINY_RECIPE.replace("PATH", str(shards)))
    assert main(["run", str(folder / "tiny.yaml"), "--runs", str(folder / "runs"), "--run-id", "r"]) == 0
    return folder


@pytest.fixture
def stopped(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run as a kill after step 8 leaves it; `resume` finds it."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    run = tmp_path / "runs" / "r"
    shutil.rmtree(run / "checkpoints" / "step-00000012")
    (run / "summary.json").unlink()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MHLA_RUNS", raising=False)
    return run


def resume(*changes: str) -> int:
    return main(["run", "tiny.yaml", "--run-id", "r", "--accept-changes", *changes])


def rates(run: Path) -> list[tuple[int, float]]:
    return [point for point in read_metrics(run / "metrics.jsonl")["train/lr"] if point[0] > 8]


def test_every_setting_is_that_of_the_recipe_from_the_first_step_on(
    stopped: Path, taken: list[Settings]
) -> None:
    changes = ["--model.optimizer.lr", "1e-4", "--model.optimizer.weight_decay", "0.9"]
    changes += ["--model.optimizer.betas", "[0.8, 0.95]", "--model.optimizer.eps", "1e-6"]
    changes += ["--model.schedule.warmup_steps", "6", "--model.schedule.min_lr", "3e-5"]
    assert resume(*changes, "--trainer.max_steps", "16") == 0
    expected = [rate(step, 1e-4, 6, 3e-5, 16) for step in range(8, 17)]
    assert [groups[0]["lr"] for groups in taken] == pytest.approx(expected[:-1], rel=1e-12)
    assert [groups[1]["lr"] for groups in taken] == pytest.approx(expected[:-1], rel=1e-12)
    assert rates(stopped) == [(step, pytest.approx(expected[step - 8])) for step in range(9, 17)]
    for groups in taken:
        assert [group["weight_decay"] for group in groups] == [0.0, 0.9]
        assert {(tuple(group["betas"]), group["eps"]) for group in groups} == {((0.8, 0.95), 1e-6)}
    saved = torch.load(stopped / "checkpoints" / "step-00000016" / "trainer.ckpt", weights_only=True)
    groups = saved["optimizer_states"][0]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.0, 0.9]
    assert [group["initial_lr"] for group in groups] == saved["lr_schedulers"][0]["base_lrs"] == [1e-4, 1e-4]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        pytest.param(
            ["--trainer.max_steps", "20"],
            [rate(step, 2e-3, 2, 0, 20) for step in range(8, 20)],
            marks=pytest.mark.slow,
        ),
        (["--trainer.max_steps", "10"], [rate(step, 2e-3, 2, 0, 10) for step in (8, 9)]),
        pytest.param(["--model.schedule.name", "constant"], [2e-3] * 4, marks=pytest.mark.slow),
        pytest.param(
            ["--model.schedule.warmup_steps", "10", "--model.schedule.warmup_lr", "1e-5"],
            [rate(step, 2e-3, 10, 0, 12, start=1e-5) for step in range(8, 12)],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["--data.batch_size", "8", "--data.micro_batch_size", "4", "--trainer.gradient_clip_val", "0.5"],
            [rate(step, 2e-3, 2, 0, 12) for step in range(8, 12)],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["longer", "shorter", "constant", "warm-up", "batch"],
)
def test_the_schedule_is_that_of_the_recipe(
    stopped: Path, taken: list[Settings], changes: list[str], expected: list[float]
) -> None:
    assert resume(*changes) == 0
    assert [groups[0]["lr"] for groups in taken] == pytest.approx(expected, rel=1e-12, abs=1e-15)


@pytest.mark.slow
def test_an_unchanged_resume_is_bit_for_bit_the_unbroken_run(stopped: Path, finished: Path) -> None:
    assert main(["run", "tiny.yaml", "--run-id", "r"]) == 0
    again, whole = (read_metrics(run / "metrics.jsonl") for run in (stopped, finished / "runs" / "r"))
    assert {tag: again[tag] for tag in ("train/loss", "train/lr")} == {
        tag: whole[tag] for tag in ("train/loss", "train/lr")
    }


@pytest.mark.parametrize(
    ("changes", "decayed"),
    [
        (["--model.optimizer.decay_mixing", "true"], "mixing"),
        pytest.param(["--model.train_only", "[mixing, head]"], None, marks=pytest.mark.slow),
    ],
    ids=["other groups", "frozen"],
)
def test_moments_follow_their_parameters_into_other_groups(
    stopped: Path, changes: list[str], decayed: str | None
) -> None:
    """A rate of nearly 0 for a step with betas of 1 - 1e-9 shows the moments as they were restored."""
    before = open_source(stopped / "checkpoints" / "step-00000008" / "trainer.ckpt")
    still = ["--model.optimizer.betas", "[0.999999999, 0.999999999]", "--model.optimizer.lr", "1e-30"]
    assert resume(*changes, *still, "--trainer.max_steps", "9") == 0
    after = open_source(stopped / "checkpoints" / "step-00000009" / "trainer.ckpt")
    trained = [name for group in after.groups for name in group["names"]]
    assert 0 < len(trained) <= len(before.names())
    for name in trained:
        assert after.scalars(name) == {"step": 9.0}
        for kind in ("exp_avg", "exp_avg_sq"):
            old, new = before.whole(name, kind), after.whole(name, kind)
            assert old.abs().max() > 0
            torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-9)
    in_decay = {name for group in after.groups if group["weight_decay"] for name in group["names"]}
    if decayed:
        assert sum(decayed in name for name in in_decay) == 2
    else:
        assert len(trained) == 4  # two mixing matrices, weight and bias of the head


@pytest.mark.slow
def test_parameters_that_were_frozen_start_without_moments_and_are_named(
    stopped: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert resume("--model.train_only", "[head]", "--trainer.max_steps", "10") == 0
    caplog.clear()
    assert resume("--model.train_only", "[head, mixing]", "--trainer.max_steps", "11") == 0
    assert "2 parameters start without moments: backbone.blocks.0." in caplog.text
    after = open_source(stopped / "checkpoints" / "step-00000011" / "trainer.ckpt")
    steps = {name.split(".")[-2]: after.scalars(name)["step"] for g in after.groups for name in g["names"]}
    assert steps == {"head": 11.0, "mixing": 1.0}


@pytest.mark.slow
def test_the_average_takes_its_decay_from_the_recipe(stopped: Path) -> None:
    """With decay 0 the average is the weights of the last step."""
    average = "[{class_path: mhla_lightning.callbacks.EMA, init_args: {decay: 0.0}}]"
    assert resume("--trainer.callbacks", average) == 0
    metrics = read_metrics(stopped / "metrics.jsonl")
    assert metrics["val_ema/loss"][-1] == (12, pytest.approx(metrics["val/loss"][-1][1]))
    assert metrics["val_ema/loss"][1][1] != metrics["val/loss"][1][1]


class _Plain(ClassificationTask):
    """SGD instead of AdamW."""

    def build_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.optimizer_config.lr, momentum=0.9)


def _fit(
    kind: type[ClassificationTask],
    shards: Path,
    folder: Path,
    steps: int,
    checkpoint: Path | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Train with a plain Trainer; return what it saves."""
    sizes = {"img_size": 8, "patch_size": 2, "embed_dim": 12, "depth": 1, "num_heads": 2}
    task = kind("deit_tiny", {"name": "mhla", "blocks": 2}, sizes, num_classes=4, **options)
    data = ImageDataModule(str(shards), batch_size=16, image_size=8)
    data.reading.__dict__["num_workers"] = 0
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        use_distributed_sampler=False,
        enable_checkpointing=False,
    )
    trainer.fit(task, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    trainer.save_checkpoint(folder / f"{steps}.ckpt")
    return dict(torch.load(folder / f"{steps}.ckpt", weights_only=True))


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint", "ignore:The 'train_dataloader'")
@pytest.mark.filterwarnings("ignore:You have overridden")
def test_a_plain_trainer_takes_the_settings_of_the_task(
    shards: Path, tmp_path: Path, taken: list[Settings], caplog: pytest.LogCaptureFixture
) -> None:
    first = _fit(ClassificationTask, shards, tmp_path, 4, optimizer=OptimizerConfig(lr=1e-3))
    taken.clear()
    changed = OptimizerConfig(lr=1e-5, weight_decay=0.3, decay_mixing=True)
    schedule = ScheduleConfig(warmup_steps=5, warmup_lr=0.0)
    last = tmp_path / "4.ckpt"
    second = _fit(ClassificationTask, shards, tmp_path, 7, last, optimizer=changed, schedule=schedule)
    expected = [rate(step, 1e-5, 5, 0.0, 7, start=0.0) for step in (4, 5, 6)]
    assert [groups[1]["lr"] for groups in taken] == pytest.approx(expected, rel=1e-12)
    assert [group["weight_decay"] for group in taken[0]] == [0.0, 0.3]
    assert {float(state["step"]) for state in second["optimizer_states"][0]["state"].values()} == {7.0}
    assert first["global_step"] == 4

    caplog.clear()
    last = tmp_path / "7.ckpt"
    third = _fit(_Plain, shards, tmp_path, 8, last, optimizer=OptimizerConfig(lr=1e-2))
    assert "the optimizer is SGD and was AdamW: it starts without moments" in caplog.text
    (group,) = third["optimizer_states"][0]["param_groups"]
    assert (group["initial_lr"], group["momentum"]) == (1e-2, 0.9)
    assert all(set(state) == {"momentum_buffer"} for state in third["optimizer_states"][0]["state"].values())

    for name in ("optimizer_class", "optimizer_groups"):  # as an earlier version wrote it
        del second[name]
    torch.save(second, last)
    with refused("ckpt_path"):
        _fit(ClassificationTask, shards, tmp_path, 8, last, train_only=["head"])
