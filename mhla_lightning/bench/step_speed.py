"""A recipe's training step under Lightning beside the same step in a bare PyTorch loop.

Lightning trains as `lightning run` does, in one call of fit, and reads from a data loader of this module.
The bare loop trains a copy of the model, made before the first step, on the same batches.
Its step comes before or after each of Lightning's in turn.

A step of Lightning lasts from its first batch to the request for the next step's first batch.
So everything that Lightning does once a step counts; reading the data counts for neither side.
What runs by the clock (progress.json every 10 s) comes twice as often for a step of Lightning as in a run.
"""

from __future__ import annotations

import copy
import math
import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from mhla_lightning.bench.bare_loop import BareLoop
from mhla_lightning.bench.source_clock import LOGGING, SAME, SourceClock
from mhla_lightning.bench.synthetic_data import SyntheticData
from mhla_lightning.bench.timing import ratio, spread
from mhla_lightning.callbacks import Checkpoint
from mhla_lightning.callbacks.draw_samples import DrawSamples
from mhla_lightning.config.length import length
from mhla_lightning.config.resolve import CheckpointConfig, Resolved
from mhla_lightning.data.stream import Batch
from mhla_lightning.errors import UserError
from mhla_lightning.runs.folder import RunFolder
from mhla_lightning.tasks import Task
from mhla_lightning.training.session import Session

LIGHTNING, BARE = "lightning", "bare"
GPU_TOLERANCE = 1e-4  # by which the losses of the sides may be apart: a GPU sums in any order, a CPU does not
PRECISIONS = ("32-true", "bf16-mixed")
_NEVER = 10**9  # steps


class Feed:
    """What Lightning takes for its data loader; drives both sides.

    Args:
        session: Lightning's side, before its fit.
        clock: Lightning's profiler.
        steps: optimizer steps of a turn.
        turns: measured, after one that warms up.
        on_turn: called after each.

    Attributes:
        bare: the other side, once training has begun.
        losses: of Lightning's micro batches.
        lightning, others: of every measured turn, seconds a step by source.
        cpu: of every measured turn, CPU seconds a step of Lightning and of the bare loop.
        events: of every measured turn on CUDA, seconds a step between events; else empty.
    """

    def __init__(
        self, session: Session, clock: SourceClock, steps: int, turns: int, on_turn: Callable[[], None]
    ) -> None:
        self.session, self.clock, self.steps, self.turns, self._on_turn = (
            session,
            clock,
            steps,
            turns,
            on_turn,
        )
        self.bare: BareLoop | None = None
        self.losses: list[Tensor] = []
        self.lightning: list[dict[str, float]] = []
        self.others: list[dict[str, float]] = []
        self.cpu: list[tuple[float, float]] = []
        self.events: list[tuple[float, float]] = []
        _, self._accumulation = session.data.micro_batch(1)
        self._read = session.data.train_dataloader

    def __len__(self) -> int:
        """Micro batches of the whole recipe: Lightning is not to see the end coming."""
        return self.session.max_steps * self._accumulation

    def __iter__(self) -> Iterator[Batch]:
        bare = self.bare = self._begin()
        batches = iter(cast(Any, self._read()))
        for turn in range(self.turns + 1):
            for step in range(self.steps):
                taken = [next(batches) for _ in range(self._accumulation)]
                if step % 2 == 0:  # the sides take turns in coming first
                    bare.step(taken)
                self.clock.resume()
                yield from taken
                self.clock.pause()
                if step % 2:
                    bare.step(taken)
            self._note(bare, counted=turn > 0)
            self._on_turn()
        self._end()

    def _note(self, bare: BareLoop, counted: bool) -> None:
        cpu = self.clock.cpu_seconds / self.steps, bare.clock.cpu_seconds / self.steps
        events = self.clock.event_seconds / self.steps, bare.clock.event_seconds / self.steps
        lightning, other = (
            {name: seconds / self.steps for name, seconds in clock.take().items()}
            for clock in (self.clock, bare.clock)
        )
        if counted:
            self.lightning.append(lightning)
            self.others.append(other)
            self.cpu.append(cpu)
            if all(events):
                self.events.append(events)

    def _begin(self) -> BareLoop:
        """The bare side's model is a copy of Lightning's before its first step."""
        session, trainer = self.session, self.session.trainer
        session.task.trainer = None  # which cannot be copied
        task = copy.deepcopy(session.task)
        session.task.trainer = trainer
        bare = BareLoop(task, trainer, trainer.strategy.root_device)
        self.clock.watch_optimizer(trainer.optimizers[0])
        for logger in trainer.loggers:
            self.clock.watch(logger, "log_metrics", LOGGING)
        _keep_losses(session.task, self.losses)
        self.clock.take()
        return bare

    def _end(self) -> None:
        """End the training without a checkpoint: this run is not resumed."""
        trainer: Any = self.session.trainer
        trainer.callbacks = [
            callback for callback in trainer.callbacks if not isinstance(callback, Checkpoint)
        ]
        trainer.should_stop = True


def _keep_losses(task: Task, losses: list[Tensor]) -> None:
    training_step = task.training_step

    def kept(batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        loss = cast(Tensor, training_step(batch, batch_idx))
        losses.append(loss.detach())
        return loss

    task.training_step = kept  # type: ignore[method-assign]


@dataclass
class StepTimes:
    """What was measured.

    Attributes:
        parameters: of the model that train and that do not.
        batch_size: samples of a step.
        loss: of the last micro batch, of both sides alike.
        lightning, bare: of every turn, seconds a step by source.
        cpu: of every turn, CPU seconds a step of Lightning and of the bare loop.
        device: that trained.
        events: of every turn on CUDA, seconds a step between events, of both; they are the time of a step
            there. Empty on a CPU, where the clock on the wall is.
    """

    parameters: int
    batch_size: int
    loss: float
    lightning: list[dict[str, float]]
    bare: list[dict[str, float]]
    cpu: list[tuple[float, float]]
    device: torch.device = torch.device("cpu")
    events: list[tuple[float, float]] = field(default_factory=list)

    def rows(self) -> list[dict[str, Any]]:
        """A row a side."""
        cpu = [statistics.median(side) for side in zip(*self.cpu, strict=True)]
        lightning, bare = zip(*self._steps, strict=True)
        return [self._row(LIGHTNING, lightning, cpu[0]), self._row(BARE, bare, cpu[1])]

    @property
    def _steps(self) -> list[tuple[float, float]]:
        """Seconds a step of both sides, of every turn."""
        if self.events:
            return self.events
        return [(sum(a.values()), sum(b.values())) for a, b in zip(self.lightning, self.bare, strict=True)]

    def _row(self, side: str, seconds: Sequence[float], cpu: float) -> dict[str, Any]:
        middle = statistics.median(seconds)
        span = {"fastest_seconds": min(seconds), "slowest_seconds": max(seconds), "cpu_seconds": cpu}
        if self.device.type == "cuda":
            span["spread_seconds"] = spread(seconds)
        return {
            "side": side,
            "step_seconds": middle,
            **span,
            "samples_per_second": self.batch_size / middle,
            "turns": len(seconds),
        }

    def summary(self) -> dict[str, float]:
        """Return the ratios of Lightning's steps to bare ones.

        By the clock and by CPU time for whole steps, and for Lightning's own part (all but SAME). A run
        sees the first. Other programs on the machine disturb it, the other two hardly.

        The first is what a run sees. Beside other programs it is uncertain by what they take; the other two
        are not.
        """
        bare = [other for _, other in self._steps]
        own = [_own(a) - _own(b) for a, b in zip(self.lightning, self.bare, strict=True)]
        cpu = ratio(*zip(*self.cpu, strict=True))
        return {
            "lightning_over_bare": statistics.median(self.ratios),
            "lightning_over_bare_cpu": cpu,
            "lightning_own_over_bare": ratio(own, bare),
        }

    @property
    def ratios(self) -> list[float]:
        """Return the ratio of Lightning's steps to bare ones, of every turn.

        Their spread shows how reliable the median is.
        """
        return [lightning / bare for lightning, bare in self._steps]

    @property
    def extra_seconds(self) -> float:
        """By how much a step is longer under Lightning, median of the turns."""
        return statistics.median(lightning - bare for lightning, bare in self._steps)

    def breakdown(self) -> list[dict[str, Any]]:
        """Return a row a source: seconds a step, medians of the turns.

        The same calls of both sides come first, then Lightning's own, the most expensive first.

        In every turn the sources add up to the step; their medians do nearly.
        """
        names = dict.fromkeys(name for turn in (*self.lightning, *self.bare) for name in turn)
        rows = [self._source(name) for name in names]
        same = sorted((row for row in rows if row["same_calls"]), key=lambda row: SAME.index(row["source"]))
        return same + sorted(
            (row for row in rows if not row["same_calls"]), key=lambda row: -row["extra_seconds"]
        )

    def _source(self, name: str) -> dict[str, Any]:
        pairs = [(a.get(name, 0.0), b.get(name, 0.0)) for a, b in zip(self.lightning, self.bare, strict=True)]
        lightning, bare = (statistics.median(column) for column in zip(*pairs, strict=True))
        times = {
            "lightning_seconds": lightning,
            "bare_seconds": bare,
            "extra_seconds": statistics.median(a - b for a, b in pairs),
        }
        return {"source": name, "same_calls": name in SAME, **times}


def _own(turn: Mapping[str, float]) -> float:
    return sum(seconds for name, seconds in turn.items() if name not in SAME)


def measure(recipe: Resolved, folder: Path, steps: int, turns: int, on_turn: Callable[[], None]) -> StepTimes:
    """Trains both sides for (turns + 1) x steps optimizer steps; the first turn is not counted.

    recipe: its validations, drawings and checkpoints are left out, and a point in TensorBoard comes at least
        once a turn. folder: of the run's files.

    Raises:
        UserError: a recipe for several processes or of a precision that the bare loop lacks, what Session
            refuses, losses that differ.
    """
    clock, run = SourceClock(), RunFolder(folder)
    run.create()
    session = Session(_for_steps(recipe, steps, turns, clock), run, resume=None)
    clock.device = device = session.trainer.strategy.root_device
    feed = Feed(session, clock, steps, turns, on_turn)
    session.data.train_dataloader = lambda: feed  # type: ignore[method-assign]
    session.logger.start()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The `srun` command is available")  # one process is meant
        session.trainer.fit(session.task, datamodule=session.data)
    assert feed.bare is not None
    loss = equal_losses(feed.losses, feed.bare.losses, 0.0 if device.type == "cpu" else GPU_TOLERANCE)
    return StepTimes(
        session.task.parameter_count,
        session.data.batch_size,
        loss,
        feed.lightning,
        feed.others,
        feed.cpu,
        device,
        feed.events,
    )


def _for_steps(recipe: Resolved, steps: int, turns: int, clock: SourceClock) -> Resolved:
    """Return the recipe as it is measured: in one process, steps alone.

    Drawings come a few times in a run, a progress bar on a terminal only.
    """
    given = recipe.trainer
    if given.get("strategy", "auto") != "auto":
        raise UserError(
            "trainer.strategy",
            f"{given['strategy']} cannot be compared: a bare loop has one process and no sharding; "
            "leave the strategy out",
        )
    if (precision := given.get("precision", PRECISIONS[0])) not in PRECISIONS:
        raise UserError(
            "trainer.precision", f"the bare loop lacks {precision}; use {' or '.join(PRECISIONS)}"
        )
    ready = recipe.data.is_ready()
    data = recipe.data if ready else SyntheticData(recipe.task, recipe.data)
    # Workers that read ahead would slow whichever side comes next.
    data.reading = replace(data.reading, num_workers=0)
    least = steps * (turns + 1) + 1  # what is left over ends the last step
    asked = length(recipe) if ready or recipe.data.epochs is None else _NEVER
    trainer = given | {
        "devices": 1,
        "num_nodes": 1,
        "max_steps": max(asked, least),
        "limit_val_batches": 0,
        "val_check_interval": 1.0,
        "log_every_n_steps": min(given.get("log_every_n_steps", 50), steps),
        "enable_progress_bar": False,
        "callbacks": [
            callback for callback in _as_list(given.get("callbacks")) if not isinstance(callback, DrawSamples)
        ],
        "profiler": clock,
    }
    data.epochs = None
    return replace(recipe, data=data, trainer=trainer, checkpoint=CheckpointConfig(every_n_steps=_NEVER))


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def equal_losses(lightning: Sequence[Tensor], bare: Sequence[Tensor], tolerance: float) -> float:
    """The last loss, once it is known that all are equal to a relative `tolerance`.

    Raises:
        UserError: some differ: the sides do not do the same work, and their times say nothing.
    """
    pairs = [(float(a), float(b)) for a, b in zip(lightning, bare, strict=True)]
    for number, (a, b) in enumerate(pairs):
        if not math.isclose(a, b, rel_tol=tolerance, abs_tol=0.0):
            raise UserError(
                None,
                f"the loss of micro batch {number} is {a!r} under Lightning and {b!r} in the bare "
                "loop: they do not do the same work, and their times"
                " cannot be compared",
            )
    return pairs[-1][0]
