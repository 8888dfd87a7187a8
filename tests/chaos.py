"""Kills runs of all tasks and strategies again and again, and demands that they end as if nothing had
happened: `make chaos`.

A series is one run of two ranks under one strategy. It is started, one rank or all are killed with SIGKILL at
a random moment or just while a checkpoint is being written, and the same command is given again, until the
run is finished. Every logged number must then equal the unbroken run's bit for bit.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from mhla_lightning.checkpoints.source import open_source
from mhla_lightning.runs.folder import complete_checkpoints, newest_checkpoint, read_metrics
from tests.helpers.ranks import Nursery, Ranks
from tests.helpers.tiny_tasks import TASKS, write_recipes

ZERO3 = "{name: zero3, zero_optimization: {stage3_param_persistence_threshold: 0}}"
STRATEGIES = {"ddp": "ddp", "zero1": "zero1", "zero2": "zero2", "zero3": ZERO3}
RANKS, STEPS, EVERY = 2, 24, 2
SPEED = ("train/samples_per_second", "train/tokens_per_second", "train/time_data", "train/time_compute")
_POLL = 0.001  # seconds


@dataclass
class Series:
    """One run and what was done to it."""

    nursery: Nursery
    recipe: Path
    strategy: str
    root: Path
    asynchronous: bool
    rng: random.Random
    kills: Counter[str] = field(default_factory=Counter)

    def start(self, run_id: str) -> Ranks:
        options = {
            "max_steps": STEPS,
            "val_check_interval": 6,
            "devices": RANKS,
            "strategy": STRATEGIES[self.strategy],
        }
        arguments = [
            "run",
            str(self.recipe),
            "--runs",
            str(self.root),
            "--run-id",
            run_id,
            "--checkpoint.every_n_steps",
            str(EVERY),
        ]
        arguments += [
            "--checkpoint.asynchronous",
            str(self.asynchronous).lower(),
            "--checkpoint.keep_last",
            "2",
        ]
        arguments += [f"--trainer.{key}={value}" for key, value in options.items()]
        return self.nursery.start(RANKS, arguments, self.root)

    def interrupt(self, ranks: Ranks, run: Path) -> bool:
        """Kills at a moment after the next checkpoint is there; False where the run has ended before.
        Whoever is left must end by itself.
        """
        before, how = newest_checkpoint(run), self.rng.choice(["step", "save", "save"])
        while newest_checkpoint(run) == before and not ranks.poll():
            time.sleep(_POLL)
        moment = time.monotonic() + self.rng.uniform(0, 0.3)
        while not ranks.poll() and (
            time.monotonic() < moment if how == "step" else not list((run / "checkpoints").glob(".tmp-*"))
        ):
            time.sleep(_POLL)
        if ranks.poll():
            return False
        victims = self.rng.choice([[0], [1], [0, 1]])
        ranks.kill(victims)
        self.kills[f"{how}, {'both ranks' if len(victims) > 1 else f'rank {victims[0]}'}"] += 1
        began = time.monotonic()
        ranks.wait(60)
        self.kills["seconds until the others ended"] = max(
            self.kills["seconds until the others ended"], round(time.monotonic() - began)
        )
        return True

    def broken(self, kills: int) -> Path:
        """The run after so many kills, finished."""
        run = self.root / "broken"
        while True:
            ranks = self.start("broken")
            if self.total < kills and self.interrupt(ranks, run):
                for checkpoint in complete_checkpoints(run):
                    source = open_source(checkpoint / "trainer.ckpt")
                    assert [len(source.whole(name)) for name in source.names() if source.whole(name).ndim], (
                        f"{checkpoint} cannot be read"
                    )
                continue
            assert ranks.wait() == [0] * RANKS, ranks.output()[-4000:]
            if self.total < kills:  # it ended before it could be killed: once more from the start
                shutil.rmtree(run)
                continue
            return run

    @property
    def total(self) -> int:
        return sum(count for what, count in self.kills.items() if not what.startswith("seconds"))


def numbers(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Every logged number that does not measure time."""
    return {tag: values for tag, values in read_metrics(run / "metrics.jsonl").items() if tag not in SPEED}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=7, help="kills a series (default: %(default)s)")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    recipes, nursery, kills, began = write_recipes(folder), Nursery(folder), Counter[str](), time.monotonic()
    for number, (task, strategy) in enumerate(
        (task, strategy) for task in args.tasks for strategy in args.strategies
    ):
        root = folder / f"{task}-{strategy}"
        root.mkdir()
        series = Series(
            nursery, recipes[task], strategy, root, bool(number % 2), random.Random(args.seed + number)
        )
        whole = series.start("whole")
        assert whole.wait() == [0] * RANKS, whole.output()[-4000:]
        broken = series.broken(args.kills)
        assert numbers(broken) == numbers(root / "whole"), (
            f"{root}: the broken run has other numbers than the whole one"
        )
        longest = series.kills.pop("seconds until the others ended")
        kills += series.kills
        saves = "written beside" if series.asynchronous else "written in turn"
        print(
            f"{task} {strategy} ({saves}): {sum(series.kills.values())} kills, others ended within "
            f"{longest} s, equal bit for bit",
            flush=True,
        )
        shutil.rmtree(root)
    nursery.close()
    shutil.rmtree(folder)
    print(f"{sum(kills.values())} kills in {time.monotonic() - began:.0f} s: {dict(kills)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
