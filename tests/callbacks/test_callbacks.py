"""Projection, averaging, heat maps and checkpoints, each under a real Trainer where it matters."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from safetensors.torch import load_file, save_file

from mhla_lightning.attention import MixingMatrix, SelfAttention
from mhla_lightning.callbacks import EMA, ProjectMixing
from mhla_lightning.callbacks.monitor import Monitor, mixing_figure, mixing_figures
from mhla_lightning.checkpoints.atomic import Keep, begin, commit, prune
from mhla_lightning.checkpoints.rng import load_rng, rng_state
from mhla_lightning.data import ImageDataModule
from mhla_lightning.data.modules.options import ReadingConfig
from mhla_lightning.runs.folder import RunFolder, complete_checkpoints, newest_checkpoint
from mhla_lightning.runs.logger import keep_until
from mhla_lightning.tasks import ClassificationTask, OptimizerConfig
from tests.helpers.errors import refused

# The parts of a trainer that EMA uses.
ONE_DEVICE: Any = SimpleNamespace(strategy=SingleDeviceStrategy(), global_step=1, callbacks=[])
OPTIONS = {"img_size": 8, "patch_size": 2, "embed_dim": 12, "depth": 2, "num_heads": 2}


class Watch(pl.Callback):
    """Calls a function after every batch, last of all."""

    def __init__(self, look: Callable[[pl.Trainer, Any], None]) -> None:
        self.look = look

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.look(trainer, pl_module)


def train(
    shards: Path,
    tmp_path: Path,
    *callbacks: pl.Callback,
    steps: int = 4,
    accumulate: int = 1,
    lr: float = 1e-2,
) -> ClassificationTask:
    pl.seed_everything(0, verbose=False)
    attention = {"name": "mhla", "blocks": 2}
    task = ClassificationTask(
        "deit_tiny", attention, OPTIONS, num_classes=4, optimizer=OptimizerConfig(lr=lr)
    )
    fit(task, shards, tmp_path, *callbacks, steps=steps, accumulate=accumulate)
    return task


def fit(
    module: pl.LightningModule,
    shards: Path,
    tmp_path: Path,
    *callbacks: pl.Callback,
    steps: int,
    accumulate: int = 1,
) -> None:
    data = ImageDataModule(
        str(shards),
        batch_size=16,
        micro_batch_size=16 // accumulate,
        image_size=8,
        reading=ReadingConfig(num_workers=0),
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        callbacks=list(callbacks),
        accumulate_grad_batches=accumulate,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, datamodule=data)


def mixing_of(task: Any) -> list[torch.Tensor]:
    return [m.weight for m in task.modules() if isinstance(m, MixingMatrix)]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_task_projects_once_a_step_before_any_callback_looks(
    shards: Path, tmp_path: Path, accumulate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A learning rate that leaves [0, 1] at once, and no ProjectMixing."""
    projected: list[int] = []
    own = MixingMatrix.project_

    def counted(matrix: MixingMatrix) -> None:
        projected.append(1)
        own(matrix)

    monkeypatch.setattr(MixingMatrix, "project_", counted)
    seen: list[tuple[int, float, float]] = []
    watch = Watch(lambda trainer, task: seen.append((trainer.global_step, *_range(task))))
    task = train(shards, tmp_path, watch, steps=3, accumulate=accumulate, lr=0.5)
    assert {step for step, _, _ in seen} >= {1, 2, 3}
    assert all(low >= 0 and high <= 1 for step, low, high in seen)
    assert any(low == 0 or high == 1 for _, low, high in seen)  # the bound was met
    assert len(projected) == 3 * len(mixing_of(task))
    train(shards, tmp_path, ProjectMixing(), steps=3, accumulate=accumulate, lr=0.5)
    assert len(projected) == 6 * len(mixing_of(task)), "the callback does nothing for a task"


class Own(pl.LightningModule):
    """A user's module around SelfAttention."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = SelfAttention(12, heads=2, grid=(2, 2), attention={"name": "mhla", "blocks": 2})

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        return self.attention(batch["image"].reshape(-1, 4, 12)).square().mean()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None: ...

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.3)


@pytest.mark.parametrize("projects", [True, False])
def test_one_line_projects_a_users_own_module(shards: Path, tmp_path: Path, projects: bool) -> None:
    seen: list[tuple[float, float]] = []
    watch = Watch(lambda trainer, module: seen.append(_range(module)))
    torch.manual_seed(0)
    fit(Own(), shards, tmp_path, *([ProjectMixing()] if projects else []), watch, steps=3)
    assert all(low >= 0 and high <= 1 for low, high in seen) == projects


def test_a_task_that_takes_its_steps_by_hand_needs_the_callback() -> None:
    class Manual(ClassificationTask):
        def optimizer_step(self, *arguments: Any) -> None: ...

    task = ClassificationTask("deit_tiny", {"name": "mhla", "blocks": 2}, OPTIONS, num_classes=4)
    assert task.projects_itself
    task.automatic_optimization = False
    assert not task.projects_itself
    assert not Manual("deit_tiny", {"name": "mhla", "blocks": 2}, OPTIONS, num_classes=4).projects_itself


def _range(task: Any) -> tuple[float, float]:
    values = torch.cat([w.detach().flatten() for w in mixing_of(task)])
    return float(values.min()), float(values.max())


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("warmup", [False, True])
def test_ema_is_the_recursion_in_float32(shards: Path, tmp_path: Path, warmup: bool, accumulate: int) -> None:
    ema = EMA(decay=0.9, warmup=warmup)
    weights: dict[int, dict[str, torch.Tensor]] = {}

    def note(trainer: pl.Trainer, task: Any) -> None:
        weights[trainer.global_step] = {
            name: p.detach().double().clone() for name, p in task.backbone.named_parameters()
        }

    task = train(shards, tmp_path, ema, Watch(note), steps=4, accumulate=accumulate)
    assert task.backbone is not None
    pl.seed_everything(0, verbose=False)
    fresh = ClassificationTask("deit_tiny", {"name": "mhla", "blocks": 2}, OPTIONS, num_classes=4)
    fresh.configure_model()
    assert fresh.backbone is not None
    expected = {name: p.detach().double() for name, p in fresh.backbone.named_parameters()}
    for step in range(1, 5):
        decay = min(0.9, (1 + step) / (10 + step)) if warmup else 0.9
        expected = {
            name: decay * value + (1 - decay) * weights[step][name] for name, value in expected.items()
        }
    assert ema.updates == 4
    for name, value in expected.items():
        torch.testing.assert_close(ema.average[name].double(), value, rtol=1e-5, atol=1e-7)


def test_ema_lends_its_weights_and_takes_them_back(shards: Path, tmp_path: Path) -> None:
    ema = EMA(decay=0.9)
    task = train(shards, tmp_path, ema)
    before = {name: p.detach().clone() for name, p in task.named_parameters()}

    def fail_inside() -> None:
        with ema.averaged(ONE_DEVICE, task):
            inside = dict(task.named_parameters())
            assert all(torch.equal(inside[f"backbone.{name}"], value) for name, value in ema.average.items())
            assert any(not torch.equal(inside[name], value) for name, value in before.items())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert all(torch.equal(p, before[name]) for name, p in task.named_parameters())


def test_ema_averages_bf16_weights_in_float32() -> None:
    """0.9999 is below bf16's resolution: an average kept in bf16 would never move."""
    task = ClassificationTask("deit_tiny", {"name": "mhla", "blocks": 2}, OPTIONS, num_classes=4)
    task.configure_model()
    task.bfloat16()
    ema = EMA(decay=0.9999, warmup=False)
    starting: Any = SimpleNamespace(strategy=SingleDeviceStrategy(), global_step=0, callbacks=[])
    ema.on_train_start(starting, task)
    assert task.backbone is not None
    start = ema.average["head.weight"].clone()
    with torch.no_grad():
        task.backbone.get_parameter("head.weight").add_(1.0)

    ema.on_train_batch_end(ONE_DEVICE, task, None, None, 0)
    torch.testing.assert_close(ema.average["head.weight"], start + 1e-4, rtol=0, atol=1e-5)
    with ema.averaged(ONE_DEVICE, task):
        assert task.backbone.get_parameter("head.weight").dtype == torch.bfloat16


def test_ema_refuses_what_is_not_its_own(tmp_path: Path) -> None:
    with refused("decay"):
        EMA(decay=1.0)
    task = ClassificationTask("deit_tiny", {"name": "mhla", "blocks": 2}, OPTIONS, num_classes=4)
    task.configure_model()
    ema = EMA()
    ema.resume_from(tmp_path)
    with refused(str(tmp_path)), ema.averaged(ONE_DEVICE, task):
        pass


def test_mixing_figure_has_a_panel_a_layer() -> None:
    figure = mixing_figure({f"layer{i}": torch.rand(4, 4) for i in range(5)} | {"heads": torch.rand(3, 4, 4)})
    drawn = [panel for panel in figure.axes if panel.get_title().startswith("layer")]
    assert [panel.get_title() for panel in drawn] == [f"layer {i}" for i in range(6)]
    array = drawn[0].get_images()[0].get_array()
    assert array is not None
    assert array.shape == (4, 4)


def test_matrices_of_the_attention_to_a_text_have_a_figure_and_numbers_of_their_own() -> None:
    """A block has both; each is numbered among its kind, and those of a text are no squares."""
    shapes = {"attn.attention": (4, 4), "cross_attn": (4, 6)}
    matrices = {
        f"blocks.{i}.{part}.mixing": torch.rand(shape) for i in range(2) for part, shape in shapes.items()
    }
    own, text = mixing_figures(matrices)
    assert [panel.get_title() for panel in own.axes[:2]] == ["layer 0", "layer 1"]
    assert [panel.get_title() for panel in text.axes[:2]] == ["text, layer 0", "text, layer 1"]
    assert text.axes[0].images[0].get_size() == (4, 6)


def test_many_layers_are_drawn_on_one_scale_three_rows_a_figure() -> None:
    figures = mixing_figures({f"layer{i}": torch.full((3, 3), i / 13) for i in range(14)})
    panels = [[one for one in figure.axes if one.get_title().startswith("layer")] for figure in figures]
    assert [panel.get_title() for one in panels for panel in one] == [f"layer {i}" for i in range(14)]
    assert [len(one) for one in panels] == [12, 2]
    for panel in (panel for one in panels for panel in one):
        assert panel.get_images()[0].get_clim() == (0, 1)
        assert (panel.get_xlabel(), panel.get_ylabel()) == ("key block", "query block")


def checkpoint(run: RunFolder, step: int) -> Path:
    folder = begin(run.checkpoints, step)
    (folder / "trainer.ckpt").write_bytes(b"weights")
    return commit(folder, step, {"step": step})


def test_checkpoints_are_complete_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(tmp_path / "run")
    run.create()
    assert newest_checkpoint(run.path) is None
    checkpoint(run, 9)
    assert checkpoint(run, 10).name == "step-00000010"
    assert newest_checkpoint(run.path) == run.checkpoints / "step-00000010"
    half = begin(run.checkpoints, 11)  # killed while writing
    (half / "trainer.ckpt").write_bytes(b"wei")
    (run.checkpoints / "step-00000012").mkdir()  # killed by something that renamed before the end
    assert newest_checkpoint(run.path) == run.checkpoints / "step-00000010"
    with monkeypatch.context() as patch:
        patch.setattr("mhla_lightning.checkpoints.atomic.sync", _disk_full)
        with pytest.raises(OSError, match="disk full"):
            checkpoint(run, 13)
    assert newest_checkpoint(run.path) == run.checkpoints / "step-00000010"
    checkpoint(run, 14)
    assert not half.exists()
    assert not list(run.checkpoints.glob(".tmp-*"))
    prune(run.path, Keep(last=2))
    assert [c.name for c in complete_checkpoints(run.path)] == ["step-00000010", "step-00000014"]
    again = checkpoint(run, 14)  # the same step once more, by an attempt that went back
    assert json.loads((again / "state.json").read_text()) == {"step": 14}


def _disk_full(path: Path) -> None:
    raise OSError("disk full")


def test_random_generators_go_on_where_they_stood(tmp_path: Path) -> None:
    random.gauss(0, 1)  # leaves a second value pending
    np.random.standard_normal()  # noqa: NPY002
    save_file(rng_state(), tmp_path / "rank-0.safetensors")
    first = [
        random.gauss(0, 1),
        random.random(),
        np.random.standard_normal(),  # noqa: NPY002
        np.random.rand(),  # noqa: NPY002
        float(torch.rand(())),
    ]  # noqa: NPY002
    load_rng(tmp_path / "rank-0.safetensors")
    assert first == [
        random.gauss(0, 1),
        random.random(),
        np.random.standard_normal(),  # noqa: NPY002
        np.random.rand(),  # noqa: NPY002
        float(torch.rand(())),
    ]  # noqa: NPY002
    assert load_file(tmp_path / "rank-0.safetensors")


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "tag": "train/loss", "value": 1.0} for step in (1, 2, 3, 4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 5, "ta')
    keep_until(path, 3)
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows[:3]
    keep_until(tmp_path / "absent.jsonl", 3)


def test_the_curves_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """100 samples a second of 4.94e12 FLOPs each are half of an H100's peak in bf16."""
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**30)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 4 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monitor = Monitor(16, tokens=256, flops=4_945_000_000_000, precision="bf16-mixed")
    expected = {
        "tokens_per_second_per_gpu": 25600.0,
        "memory_allocated_gib": 3.0,
        "memory_reserved_gib": 4.0,
        "mfu": 0.5,
    }
    assert monitor.on_gpu(100.0) == pytest.approx(expected)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "another")
    assert "mfu" not in monitor.on_gpu(100.0)
