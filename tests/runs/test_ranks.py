"""The watch over the ranks that a run has started."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mhla_lightning.runs.ranks import PREEMPTED, Ended, Watch


def watch_over(codes: list[int], run: Path) -> Watch:
    """A watch over processes that have ended with exit codes; it is not running."""
    ended = [subprocess.Popen([sys.executable, "-SE", "-c", f"raise SystemExit({code})"]) for code in codes]
    for process in ended:
        process.wait(60)
    return Watch(ended, 1, len(codes) + 1, run)


def test_a_rank_that_is_asked_to_stop_before_all_have_met_ends_the_run(tmp_path: Path) -> None:
    """Rank 0 waited for it in torch's store for half an hour."""
    watch = watch_over([0, PREEMPTED], tmp_path)
    failed = watch.failure()
    assert failed == Ended(rank=2, world_size=3, code=PREEMPTED, told="")
    assert failed.exit_code == PREEMPTED
    assert "rank 2 of 3 was asked to stop before training began" in str(failed)


@pytest.mark.parametrize("codes", [[0, 0], [PREEMPTED, PREEMPTED]])
def test_ranks_that_end_in_training_have_not_failed(codes: list[int], tmp_path: Path) -> None:
    watch = watch_over(codes, tmp_path)
    watch.training = True
    assert watch.failure() is None
    assert watch.ended()


@pytest.mark.parametrize("training", [False, True])
def test_a_rank_that_fails_is_named_at_any_time(training: bool, tmp_path: Path) -> None:
    watch = watch_over([PREEMPTED if training else 0, 3], tmp_path)
    watch.training = training
    failed = watch.failure()
    assert failed is not None
    assert (failed.rank, failed.exit_code) == (2, 1)
    assert "rank 2 of 3 ended with exit code 3" in str(failed)
