"""A killed run resumes with the exact next sample, on any number of processes and workers."""

from __future__ import annotations

import json
import os
import random
from collections import defaultdict
from pathlib import Path

import pytest

from mhla_lightning.runs.folder import complete_checkpoints, read_metrics
from tests.helpers.killed_runs import exact_metrics, fit, fit_killed
from tests.helpers.ranks import Nursery

MIXED = ["--model.mixup", "0.8", "--model.cutmix", "1.0", "--model.schedule.name", "constant"]
TWO = ["--trainer.devices", "2"]


def samples(run: Path) -> dict[int, list[tuple[int, int, str]]]:
    """(epoch, index, key) of every sample of every step; sorted where several processes took them."""
    steps: dict[int, list[tuple[int, int, str]]] = defaultdict(list)
    logs = sorted((run / "samples").glob("rank-*.jsonl"))
    for log in logs:
        for line in map(json.loads, log.read_text().splitlines()):
            steps[line["step"]] += zip(line["epoch"], line["index"], line["key"], strict=True)
    return {step: sorted(taken) if len(logs) > 1 else taken for step, taken in steps.items()}


@pytest.mark.slow
def test_killed_in_the_middle_of_epochs(nursery: Nursery, recipe: Path, tmp_path: Path) -> None:
    """Bit for bit the unbroken run: 4 steps an epoch, a checkpoint every 3, 2 workers, mixup."""
    extra = [
        *MIXED,
        "--data.num_workers",
        "2",
        "--checkpoint.every_n_steps",
        "3",
        "--trainer.max_steps",
        "24",
        "--trainer.val_check_interval",
        "8",
    ]
    whole, cut = tmp_path / "runs" / "whole", tmp_path / "runs" / "cut"
    fit(nursery, recipe, whole, *extra)
    kills = sum(fit_killed(nursery, recipe, cut, step, *extra) for step in (7, 14))
    fit(nursery, recipe, cut, *extra)
    assert kills == 2
    assert samples(cut) == samples(whole)
    assert exact_metrics(cut) == exact_metrics(whole)
    assert sorted(samples(whole)) == list(range(24))


@pytest.mark.slow
def test_one_two_one_processes(nursery: Nursery, recipe: Path, tmp_path: Path) -> None:
    """Other processes, workers and micro batches: the same global batches and nearly the same losses."""
    extra = [*MIXED, "--checkpoint.every_n_steps", "5"]
    whole, elastic = tmp_path / "runs" / "whole", tmp_path / "runs" / "elastic"
    fit(nursery, recipe, whole, *extra, "--trainer.max_steps", "15")
    for steps, place in (
        ("5", ["--data.micro_batch_size", "4"]),
        ("10", [*TWO, "--data.num_workers", "1"]),
        ("15", ["--data.num_workers", "2"]),
    ):
        changed = [] if steps == "5" else ["--accept-changes"]  # only the length changes
        fit(nursery, recipe, elastic, *extra, "--trainer.max_steps", steps, *place, *changed)
    assert {step: sorted(taken) for step, taken in samples(whole).items()} == samples(elastic)
    losses = [dict(read_metrics(run / "metrics.jsonl")["train/loss"]) for run in (whole, elastic)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert sorted(losses[1]) == list(range(1, 16))


@pytest.mark.slow
def test_a_killed_run_goes_on_on_two_processes_without_being_asked(
    nursery: Nursery, recipe: Path, tmp_path: Path
) -> None:
    """Devices and workers may change without --accept-changes."""
    extra = [*MIXED, "--checkpoint.every_n_steps", "4", "--trainer.max_steps", "24"]
    whole, cut = tmp_path / "runs" / "whole", tmp_path / "runs" / "cut"
    fit(nursery, recipe, whole, *extra)
    assert fit_killed(nursery, recipe, cut, 9, *extra)
    before = complete_checkpoints(cut)[-1].name
    assert f"resumed from {before}" in fit(nursery, recipe, cut, *extra, *TWO)
    assert {step: sorted(taken) for step, taken in samples(whole).items()} == samples(cut)
    losses = [dict(read_metrics(run / "metrics.jsonl")["train/loss"]) for run in (whole, cut)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_cpu_recipe_killed_at_twenty_random_steps(nursery: Nursery, tmp_path: Path) -> None:
    """The packaged recipe: sample keys and every metric equal the unbroken run's, bit for bit."""
    recipe = "classification/deit_tiny_mhla_mnist_cpu"
    data = ["--data.path", str(tmp_path / "mnist"), "--data.source", "mnist", "--data.num_workers", "2"]
    steps = [
        "--trainer.max_steps",
        "260",
        "--trainer.val_check_interval",
        "100",
        "--checkpoint.every_n_steps",
        "7",
    ]
    extra = [*MIXED[:4], *data, *steps]
    whole, cut = tmp_path / "runs" / "whole", tmp_path / "runs" / "cut"
    fit(nursery, recipe, whole, *extra)
    at = sorted(random.Random(os.environ.get("MHLA_TEST_SEED", "20")).sample(range(8, 250), 20))
    killed = [step for step in at if fit_killed(nursery, recipe, cut, step, *extra)]
    fit(nursery, recipe, cut, *extra)
    assert killed == at
    assert samples(cut) == samples(whole)
    assert exact_metrics(cut) == exact_metrics(whole)
    print(
        f"killed at {killed}: {sum(map(len, samples(cut).values()))} samples and "
        f"{sum(map(len, exact_metrics(cut).values()))} values equal"
    )
