"""The ZeRO presets under a plain `L.Trainer`, by their names."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import StrategyRegistry

import mhla_lightning
from mhla_lightning.runs.folder import RunFolder, read_metrics
from mhla_lightning.strategies.config import ZERO
from mhla_lightning.strategies.zero.strategy import ZeroStrategy
from mhla_lightning.tasks import ClassificationTask
from tests.helpers.errors import refused
from tests.helpers.ranks import ONE_THREAD

OPTIONS = {"img_size": 8, "patch_size": 2, "embed_dim": 12, "depth": 1, "num_heads": 2}
PRECISIONS = {"32-true": "32-true", "bf16-mixed": "32-true", "bf16-true": "bf16-true"}  # ours -> Lightning's


def trainer(strategy: str, **arguments: Any) -> Trainer:
    return Trainer(strategy=strategy, accelerator="cpu", devices=1, logger=False, barebones=True, **arguments)


def test_a_later_import_of_the_registry_finds_the_presets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`import mhla_lightning` before Lightning, with another module in the place of Lightning's."""
    name = "a_registry_of_strategies"
    (tmp_path / f"{name}.py").write_text(
        "from lightning.fabric.strategies.registry import _StrategyRegistry\n"
        "StrategyRegistry = _StrategyRegistry()\nStrategyRegistry.register('zero1', dict)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(mhla_lightning, "_STRATEGIES", name)
    before = list(sys.meta_path)
    mhla_lightning._register_strategies()
    mhla_lightning._register_strategies()
    assert len(sys.meta_path) == len(before) + 1
    registry = importlib.import_module(name).StrategyRegistry
    assert sys.meta_path == before
    assert list(registry) == list(ZERO)
    assert registry["zero1"]["strategy"] is dict, "another package's name stays"
    mhla_lightning._register_strategies()
    assert sys.meta_path == before
    assert set(ZERO) <= set(StrategyRegistry)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_name_gives_what_a_run_has(precision: Any) -> None:
    strategy = trainer("zero2", precision=precision).strategy
    run: Any = ZeroStrategy("zero2", precision, on_cpu=True)
    assert isinstance(strategy, ZeroStrategy)
    assert strategy.precision_plugin.precision == PRECISIONS[precision]
    assert (strategy.entry, strategy.recipe_precision, strategy.on_cpu) == (
        run.entry,
        run.recipe_precision,
        run.on_cpu,
    )


def test_what_zero_cannot_do_is_refused_as_in_a_run() -> None:
    with refused("trainer.precision"):
        trainer("zero2", precision="16-mixed")
    task = ClassificationTask("deit_tiny", "mhla", OPTIONS, num_classes=4, compile="whole")
    task.trainer = trainer("zero3")
    with refused("compile"):
        task.setup("fit")
    task.trainer = trainer("zero2")
    task.setup("fit")
    task = ClassificationTask("deit_tiny", "mhla", OPTIONS, num_classes=4, compile="blocks")
    task.configure_model()  # its blocks would be compiled together with the hooks that gather weights
    task.trainer = trainer("zero3")
    with refused("compile"):
        task.setup("fit")


SCRIPT = """
import json, sys
import mhla_lightning as mhla
import lightning as L
shards, strategy, precision, out = sys.argv[1:]
trainer = L.Trainer(strategy=strategy, precision=precision, accelerator="cpu", devices=2, max_steps=4,
    gradient_clip_val=0.5, log_every_n_steps=1, enable_checkpointing=False, use_distributed_sampler=False,
    accumulate_grad_batches=2, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
    logger=L.pytorch.loggers.CSVLogger(out, "", ""))
L.seed_everything(0, workers=True)
from mhla_lightning.tasks.optimization import OptimizerConfig, ScheduleConfig
from mhla_lightning.data import Augmentation, ReadingConfig
options = {"img_size": 8, "patch_size": 2, "embed_dim": 12, "depth": 2, "num_heads": 2}
task = mhla.ClassificationTask("deit_tiny", {"name": "mhla", "blocks": 2}, options, num_classes=4,
    optimizer=OptimizerConfig(lr=2.0e-3), schedule=ScheduleConfig(warmup_steps=2))
data = mhla.ImageDataModule(shards, 16, 4, image_size=8, reading=ReadingConfig(num_workers=0),
    augmentation=Augmentation(scale=(0.6, 1.0), auto_augment=None, crop_pct=1.0))
trainer.fit(task, data)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "precision"), [("zero2", "32-true"), ("zero3", "bf16-mixed")])
def test_two_processes_learn_what_a_run_learns(
    recipe: Path, shards: Path, tmp_path: Path, strategy: str, precision: str
) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), str(shards), strategy, precision, str(tmp_path)]
    subprocess.run(command, check=True, env={**os.environ, **ONE_THREAD}, capture_output=True)
    rows = (tmp_path / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("train/loss")
    plain = [float(row.split(",")[column]) for row in rows[1:]]
    arguments = {"strategy": strategy, "precision": precision, "max_steps": 4, "gradient_clip_val": 0.5}
    overrides = {f"trainer.{key}": value for key, value in (arguments | {"devices": 2}).items()}
    words = [word for key, value in overrides.items() for word in (f"--{key}", json.dumps(value))]
    run = ["run", str(recipe), "--run-id", "r", *words, "--data.micro_batch_size", "4"]
    subprocess.run(
        [sys.executable, "-m", "mhla_lightning", *run], check=True, env={**os.environ, **ONE_THREAD}
    )
    curve = read_metrics(RunFolder(tmp_path / "runs" / "r").metrics)["train/loss"]
    assert plain == pytest.approx([value for _, value in curve], rel=1e-6)
