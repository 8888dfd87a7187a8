"""Training and validation of every family on a pretended GPU: one device, and few waits of the host."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from mhla_lightning.config.recipes import apply_overrides, load_recipe
from mhla_lightning.config.resolve import resolve
from mhla_lightning.runs.folder import RunFolder
from mhla_lightning.training import session as sessions
from tests.helpers import diffusion_models, language_runs
from tests.helpers.marks import every_nth
from tests.helpers.pretended_gpu import (
    DeviceMismatchError,
    PretendedAccelerator,
    PretendedStrategy,
    Record,
    pretended_gpu,
)

STEPS = 4
OPTIONS = {
    "trainer.max_steps": STEPS,
    "trainer.val_check_interval": STEPS,
    "trainer.log_every_n_steps": 0,
    "trainer.gradient_clip_val": 1.0,
    "checkpoint.every_n_steps": STEPS,
}


class Phases(pl.Callback):
    """Names the phases of a record by the optimizer step that runs, and spoils the gradients of one.

    Args:
        record: of the run.
        spoiled: this step has a gradient that is not finite; None spoils none.
    """

    def __init__(self, record: Record, spoiled: int | None = None) -> None:
        self.record, self.spoiled = record, spoiled
        self.weights: list[list[torch.Tensor]] = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.record.phase = f"step {trainer.global_step + 1}"
        if self.spoiled is not None:
            self.weights.append([x.held.clone() for x in pl_module.parameters()])  # type: ignore[attr-defined]

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step + 1 == self.spoiled:
            next(x.grad for x in pl_module.parameters() if x.grad is not None).fill_(torch.nan)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.record.phase = "validation"


class Trained:
    """A run on the pretended GPU.

    Args:
        path: of its recipe.
        folder: of the run, new.
        monkeypatch: of the test.
        spoiled: see :class:`Phases`.
        more: overrides.
    """

    def __init__(
        self,
        path: Path,
        folder: Path,
        monkeypatch: pytest.MonkeyPatch,
        spoiled: int | None = None,
        **more: Any,
    ) -> None:
        recipe = resolve(apply_overrides(load_recipe(str(path)).values, OPTIONS | more))
        monkeypatch.setattr(
            sessions,
            "strategy_arguments",
            lambda arguments: {"strategy": PretendedStrategy(), "accelerator": PretendedAccelerator()},
        )
        (folder / "checkpoints").mkdir(parents=True)
        with pretended_gpu(monkeypatch) as self.record:
            self.phases = Phases(self.record, spoiled)
            recipe.trainer["callbacks"] = [*recipe.trainer.get("callbacks", []), self.phases]
            session = sessions.Session(recipe, RunFolder(folder), None)
            session.fit()
        self.optimizer = session.trainer.optimizers[0]

    def check_waits(self) -> None:
        """In a step of the middle the host waits once, for the verdict on the gradients."""
        for step in range(2, STEPS):
            waits = self.record.of(f"step {step}")
            assert sum(waits.values()) == 1, waits
            assert next(iter(waits)).startswith("wait for an event mhla_lightning/callbacks/health.py")


def classification(folder: Path, shards: Path) -> tuple[Path, dict[str, Any]]:
    from tests.helpers.images import TINY_RECIPE

    path = folder / "tiny.yaml"
    path.write_text(TINY_RECIPE.replace("PATH", str(shards)))
    return path, {"model.loss.mixup": 0.8, "model.loss.cutmix": 1.0}


def image_dit(folder: Path, shards: Path) -> tuple[Path, dict[str, Any]]:
    return diffusion_models.write_recipe(folder / "tiny.yaml", shards), {}


def language(folder: Path, shards: Path) -> tuple[Path, dict[str, Any]]:
    path = folder / "tiny.yaml"
    path.write_text(language_runs.RECIPE.replace("PATH", str(language_runs.write_text(folder))))
    return path, {}


def video_dit(folder: Path, shards: Path) -> tuple[Path, dict[str, Any]]:
    from tests.helpers import video_runs

    return video_runs.write_recipe(folder / "tiny.yaml", video_runs.write_clips(folder / "clips")), {}


@pytest.mark.parametrize("family", every_nth([language, classification, image_dit, video_dit], 2))
def test_a_step_waits_once_and_mixes_no_devices(
    family: Callable[[Path, Path], tuple[Path, dict[str, Any]]],
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, more = family(tmp_path, shards)
    Trained(path, tmp_path / "run", monkeypatch, **more).check_waits()


def test_a_fused_optimizer_leaves_out_a_step(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights are as before it, and AdamW has counted the other steps only."""
    run = Trained(recipe, tmp_path / "run", monkeypatch, spoiled=3)
    before, spoiled, after = run.phases.weights[1:4]
    assert all(torch.equal(a, b) for a, b in zip(spoiled, after, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(before, spoiled, strict=True))
    assert all(group["fused"] for group in run.optimizer.param_groups)
    assert {float(state["step"]) for state in run.optimizer.state.values()} == {STEPS - 1}


def test_two_devices_are_refused_and_waits_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretended_gpu(monkeypatch) as record:
        there = torch.arange(3.0).pin_memory().to("cuda", non_blocking=True)
        assert not record.waits
        with pytest.raises(DeviceMismatchError, match="add"):
            there + torch.ones(3)
        assert (there + torch.ones(3, device="cuda")).tolist() == [1.0, 2.0, 3.0]
        assert float(there.sum()) == 3.0
        torch.ones(3).to(there.device)
    assert sorted(what.split(" tests")[0] for _, what, _ in record.waits) == [
        "blocking copy to the device",
        "wait aten._local_scalar_dense.default",
        "wait tolist",
    ]
