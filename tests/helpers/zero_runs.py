"""Runs of the tiny recipe under every strategy, and comparisons of their ends."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mhla_lightning.checkpoints.source import CheckpointSource, open_source
from mhla_lightning.runs.folder import complete_checkpoints, read_metrics
from tests.helpers.ranks import Nursery

# With the usual threshold tensors of a tiny model stay whole on every rank, and stage 3 would split nothing.
ZERO3 = "{name: zero3, zero_optimization: {stage3_param_persistence_threshold: 0}}"


STRATEGIES = {
    "ddp": "ddp",
    "zero1": "zero1",
    "zero2": "zero2",
    "zero3": ZERO3,
    "zero3_small_whole": "zero3",
    "zero2_offload": "zero2_offload",
}


CURVES = ("train/loss", "val/loss", "val_ema/loss")


class Runs:
    """Trains the tiny recipe under a strategy, once for the whole module."""

    def __init__(self, nursery: Nursery, folder: Path, recipe: Path) -> None:
        self.nursery, self.root, self.recipe = nursery, folder, recipe

    def train(self, name: str, strategy: str, ranks: int, *overrides: str) -> Path:
        """The run folder, trained to its end."""
        place = [
            "--runs",
            str(self.root),
            "--run-id",
            name,
            "--trainer.devices",
            str(ranks),
            "--trainer.strategy",
            strategy,
        ]
        self.nursery.run(ranks, ["run", str(self.recipe), *place, *overrides], self.root)
        return self.root / name

    def of(self, name: str) -> Path:
        """The run of two ranks under a strategy, or `one` of one process."""
        folder = self.root / name
        if (folder / "summary.json").is_file():
            return folder
        return self.train(name, "auto", 1) if name == "one" else self.train(name, STRATEGIES[name], 2)

    def broken_off(self, run: Path, copy: str) -> Path:
        """A copy of a run as a kill after step 4 leaves it."""
        folder = self.root / copy
        shutil.copytree(run, folder)
        for later in complete_checkpoints(folder)[1:]:
            shutil.rmtree(later)
        (folder / "summary.json").unlink()
        return folder


def curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    series = read_metrics(run / "metrics.jsonl")
    return {tag: series[tag] for tag in (*CURVES, "train/grad_norm")}


def assert_close_curves(got: Path, expected: Path, tolerance: float) -> None:
    ours, theirs = curves(got), curves(expected)
    for tag in CURVES:
        assert [step for step, _ in ours[tag]] == [step for step, _ in theirs[tag]]
        assert [value for _, value in ours[tag]] == pytest.approx(
            [value for _, value in theirs[tag]], abs=tolerance
        ), tag


def end_of(run: Path) -> CheckpointSource:
    return open_source(complete_checkpoints(run)[-1] / "trainer.ckpt")


def nvme(folder: Path, *, groups: int = 10**6, weights: str = "nvme", more: str = "") -> str:
    """The preset, with the optimizer's state in groups of so many numbers."""
    swap = f"nvme_path: {folder / 'swap'}"
    places = f"offload_optimizer: {{{swap}}}, offload_param: {{device: {weights}, {swap}{more}}}"
    return (
        f"{{name: zero3_nvme, zero_optimization: {{stage3_param_persistence_threshold: 0, "
        f"sub_group_size: {groups}, {places}}}}}"
    )
