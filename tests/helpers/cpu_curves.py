"""Losses of every family's CPU recipe on a few made-up batches, to compare a GPU's training with a CPU's.

    python -m tests.helpers.cpu_curves     # writes tests/golden/cpu_curves.json anew, on a CPU

The recipes' own data is not needed: a model that trains learns the few batches by heart.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest

from mhla_lightning.bench.synthetic_data import SyntheticData
from mhla_lightning.callbacks import EMA
from mhla_lightning.config.recipes import apply_overrides, load_recipe
from mhla_lightning.config.resolve import resolve
from mhla_lightning.data.stream import Batch
from mhla_lightning.runs.folder import RunFolder, read_metrics
from mhla_lightning.training.session import Session

GOLDEN = Path(__file__).parents[1] / "golden" / "cpu_curves.json"
STEPS = 200
RECIPES = {
    "classification": "classification/deit_tiny_mhla_mnist_cpu",
    "image_dit": "image_dit/dit_tiny_mhla_mnist_cpu",
    "language": "language/lm_tiny_mhla_stdlib_cpu",
    "video_dit": "video_dit/wan_tiny_mhla_clips_cpu",
}
_BATCHES = 4


class FewBatches(SyntheticData):
    """The same few batches again and again."""

    def train_dataloader(self) -> Iterator[Batch]:
        return cycle(list(islice(super().train_dataloader(), _BATCHES)))


class StopAfter(pl.Callback):
    """Ends the training early."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.steps


def losses(
    family: str, folder: Path, steps: int = STEPS, overrides: Mapping[str, Any] | None = None
) -> list[float]:
    """Train a recipe as a run does; return the loss of every step.

    Args:
        family: key of RECIPES.
        folder: of the run, new.
        steps: optimizer steps; the schedule is that of STEPS.
        overrides: of the recipe, dotted.
    """
    given: dict[str, Any] = {
        "trainer.max_steps": STEPS,
        "trainer.limit_val_batches": 0,
        "trainer.log_every_n_steps": 1,
    }
    given |= {"data.path": "nowhere", "checkpoint.every_n_steps": STEPS, **(overrides or {})}
    recipe = resolve(apply_overrides(load_recipe(RECIPES[family]).values, given))
    data = FewBatches(recipe.task, recipe.data)
    data.epochs = None
    averages = [one for one in recipe.trainer.get("callbacks", []) if isinstance(one, EMA)]
    recipe = replace(recipe, data=data, trainer=recipe.trainer | {"callbacks": [*averages, StopAfter(steps)]})
    (folder / "checkpoints").mkdir(parents=True)
    session = Session(recipe, RunFolder(folder), None)
    session.logger.start()
    session.trainer.fit(session.task, datamodule=session.data)
    return [loss for _, loss in read_metrics(folder / "metrics.jsonl")["train/loss"]]


def golden(family: str) -> list[float]:
    """Return the CPU's losses of a family; skip the test where they have not been computed."""
    curves = json.loads(GOLDEN.read_text()) if GOLDEN.is_file() else {}
    if family not in curves:
        pytest.skip(f"{GOLDEN.name} lacks {family}; `python -m tests.helpers.cpu_curves` computes it")
    return list(curves[family])


def main() -> None:
    """Write the golden file."""
    curves = {}
    for family in RECIPES:
        with tempfile.TemporaryDirectory() as folder:
            found = losses(family, Path(folder, family), overrides={"trainer.accelerator": "cpu"})
        curves[family] = [float(f"{loss:.7g}") for loss in found]
        GOLDEN.write_text(json.dumps(curves) + "\n")


if __name__ == "__main__":
    main()
