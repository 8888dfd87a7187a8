"""Batch arithmetic and dealing: pure functions."""

import itertools
import subprocess
import sys

import pytest

from mhla_lightning.data.batching import eval_batches_per_rank, eval_ranges, split_batch, steps_for_epochs
from tests.helpers.errors import refused


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((256, 1), (256, 1)),
        ((256, 4), (64, 1)),
        ((256, 4, 16), (16, 4)),
        ((6, 3, 1), (1, 2)),
        ((5, 5), (1, 1)),
    ],
)
def test_split_batch(arguments: tuple, expected: tuple[int, int]) -> None:
    assert split_batch(*arguments) == expected


@pytest.mark.parametrize(
    ("arguments", "key", "works"),
    [
        ((250, 4), "batch_size", "248 or 252"),
        ((2, 4), "batch_size", "that work: 4"),
        ((0, 1), "batch_size", "at least 1"),
        ((256, 4, 48), "micro_batch_size", "1, 2, 4, 8, 16, 32, 64"),
        ((256, 4, 0), "micro_batch_size", "1, 2, 4"),
        ((256, 4, 128), "micro_batch_size", "64"),
    ],
)
def test_split_batch_names_sizes_that_work(arguments: tuple, key: str, works: str) -> None:
    """The nearest sizes are the point of this message, so its wording is asserted."""
    with refused(key) as error:
        split_batch(*arguments)
    assert works in error.value.reason


@pytest.mark.parametrize(
    ("epochs", "samples", "batch_size", "steps"),
    [(1, 100, 10, 10), (1, 101, 10, 11), (0.07, 100, 1, 7), (300, 1281167, 1024, 375342), (0.5, 5, 10, 1)],
)
def test_steps_for_epochs(epochs: float, samples: int, batch_size: int, steps: int) -> None:
    assert steps_for_epochs(epochs, samples, batch_size) == steps


@pytest.mark.parametrize("epochs", [0, -1.0, float("nan"), float("inf")])
def test_steps_for_epochs_refuses(epochs: float) -> None:
    with refused("epochs"):
        steps_for_epochs(epochs, 10, 1)


@pytest.mark.parametrize("samples", [1, 7, 8, 9, 100])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("workers", [1, 2, 5])
def test_eval_ranges_cover_all_samples_with_equal_batches(samples: int, world: int, workers: int) -> None:
    batch = 4
    ranges = [
        [eval_ranges(samples, batch, rank, world, worker, workers) for worker in range(workers)]
        for rank in range(world)
    ]
    assert {sum(map(len, rank)) for rank in ranges} == {eval_batches_per_rank(samples, batch, world)}
    seen = [
        index for rank in ranges for worker in rank for start, stop in worker for index in range(start, stop)
    ]
    assert sorted(seen) == list(range(samples))
    assert all(0 <= stop - start <= batch for rank in ranges for worker in rank for start, stop in worker)


def test_eval_batches_are_the_same_for_any_number_of_workers() -> None:
    one = eval_ranges(50, 4, 1, 3)
    two = [eval_ranges(50, 4, 1, 3, worker, 2) for worker in range(2)]
    collected = [batch for pair in itertools.zip_longest(*two) for batch in pair if batch is not None]
    assert collected == one


def test_planning_imports_no_torch() -> None:
    code = (
        "import sys, mhla_lightning.data.index, mhla_lightning.data.batching, mhla_lightning.cli.data as "
        "cli\n"
    )
    code += "print({'torch', 'webdataset'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"
