"""What a task asks of the trainer that trains it."""

from __future__ import annotations

import math
from typing import Any, Protocol, cast, runtime_checkable

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.plugins.precision import HalfPrecision
from lightning.pytorch.trainer.states import TrainerFn

from mhla_lightning.errors import UserError
from mhla_lightning.runs.whole_strategies import holds_whole


@runtime_checkable
class HasEpochs(Protocol):
    """A data module that knows its epochs before its loader is made."""

    def steps_of_epoch(self) -> int:
        """Return the optimizer steps of an epoch of the trainer."""
        ...


@runtime_checkable
class TellsSkippedSteps(Protocol):
    """The part of strategies.sharding.Sharding by which a task knows a strategy of that kind."""

    def skipped_step(self) -> bool:
        """Whether the strategy left out the last optimizer step."""
        ...


@runtime_checkable
class GathersWeights(Protocol):
    """The part of a DeepSpeed strategy that tells whether layers gather their weights."""

    @property
    def zero_stage_3(self) -> bool:
        """Whether they are."""
        ...


@runtime_checkable
class SavesWholeFiles(Protocol):
    """A strategy whose Lightning checkpoints hold all weights, also split ones."""

    @property
    def saves_whole_files(self) -> bool:
        """Whether it does."""
        ...


def check_precision(trainer: pl.Trainer, eps: float) -> None:
    """Refuse weights and moments in float16 where the optimizer's eps is 0.

    The first step would divide by it. DeepSpeed keeps both in float32, so its strategies take this precision.

    Raises:
        UserError: such a precision.
    """
    plugin = trainer.precision_plugin
    if not (isinstance(plugin, HalfPrecision) and plugin.precision == "16-true"):
        return
    if torch.tensor(eps).half().item() == 0:
        raise UserError(
            "trainer.precision",
            f"16-true keeps weights and moments in float16, where `optimizer.eps` {eps:g} is 0 and the "
            "weights become NaN; take 16-mixed or bf16-true, or an eps of 1e-4",
        )


def check_strategy(trainer: pl.Trainer) -> None:
    """Refuse unknown strategies that split weights, and callbacks that cannot read such weights.

    Raises:
        UserError: such a strategy, or a callback of Lightning's that averages or saves split weights.
    """
    strategy = trainer.strategy
    if holds_whole(type(strategy)):
        return
    if not isinstance(strategy, TellsSkippedSteps):
        raise UserError(
            "trainer.strategy",
            f"'{type(strategy).__name__}' is not supported: nobody can project or save the weights that it "
            "splits; allowed: auto, ddp, and zero1, zero2, zero3 of mhla_lightning",
        )
    for callback in cast(Any, trainer).callbacks:  # an attribute that Lightning's connector sets
        if isinstance(callback, StochasticWeightAveraging | WeightAveraging):
            raise UserError(
                "trainer.callbacks",
                f"{type(callback).__name__} cannot average weights that are split among ranks; take "
                "mhla_lightning.callbacks.EMA",
            )
        saves = isinstance(strategy, SavesWholeFiles) and strategy.saves_whole_files
        if isinstance(callback, ModelCheckpoint) and not saves and trainer.state.fn == TrainerFn.FITTING:
            raise UserError(
                "trainer.callbacks",
                "ModelCheckpoint, which Lightning adds by itself, would save none of the weights split "
                "among ranks; give enable_checkpointing=False, or train by `lightning run`, which saves them",
            )


def check_copies(trainer: pl.Trainer, has_weights: bool) -> None:
    """Refuse a callback that has copied the task before it had weights. Raises UserError."""
    for callback in cast(Any, trainer).callbacks:
        if isinstance(callback, StochasticWeightAveraging) and not has_weights:
            raise UserError(
                "trainer.callbacks",
                "StochasticWeightAveraging copies the task before it has weights, and would average nothing; "
                "call the task's configure_model() before fit, or take mhla_lightning.callbacks.EMA",
            )


def run_length(trainer: pl.Trainer) -> int:
    """Return the optimizer steps after which a trainer ends; 0 where nobody knows.

    With our data, trainer.estimated_stepping_batches would make Lightning forget the restored position
    (Lightning issue 20550).
    """
    data, epochs = cast(Any, trainer).datamodule, trainer.max_epochs or 0
    limits = [trainer.max_steps] if trainer.max_steps > 0 else []
    if epochs > 0 and isinstance(data, HasEpochs):
        limits.append(epochs * data.steps_of_epoch())
    elif epochs > 0 and math.isfinite(steps := trainer.estimated_stepping_batches):
        limits.append(int(steps))
    return min(limits, default=0)


def draws_point(trainer: pl.Trainer) -> bool:
    """Return whether the curves of training have a point at the last optimizer step.

    `trainer.log_every_n_steps` 0 draws none.
    """
    every = int(cast(Any, trainer).log_every_n_steps)  # an attribute that Lightning's connector sets
    return every > 0 and trainer.global_step % every == 0
