"""The questions that callbacks, checkpoints and health put to a strategy, as one Protocol."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn

from mhla_lightning.errors import UserError
from mhla_lightning.runs.whole_strategies import holds_whole
from mhla_lightning.strategies.config import allowed_instead
from mhla_lightning.strategies.local import LocalWeights, WholeWeights

Result = TypeVar("Result")


@runtime_checkable
class Sharding(Protocol):
    """How a strategy holds the weights and takes its steps.

    A strategy of another package that splits the weights implements these members. Then averages,
    projections, checkpoints and health work with it.
    """

    @property
    def guards_steps(self) -> bool:
        """Whether the strategy itself leaves out steps whose gradients are not finite.

        Then the parameters' `grad` is None in every hook.
        """
        ...

    @property
    def local_weights(self) -> LocalWeights:
        """The weights as this rank holds them."""
        ...

    def run_forward(self, function: Callable[[], Result]) -> Result:
        """Call a function that runs the module's forward outside of Lightning's steps.

        It runs as in a step: autocast is on and split weights are gathered. Every rank calls it.
        """
        ...

    def gradient_norm(self) -> Tensor | None:
        """Return the norm of the last step's gradients before clipping, over all ranks.

        None where the strategy does not measure it (`guards_steps` is False).
        """
        ...

    def skipped_step(self) -> bool:
        """Whether the strategy left out the last optimizer step, on every rank."""
        ...

    def group_names(self) -> list[list[str]]:
        """Return the names of the parameters of every optimizer group, in order."""
        ...


@dataclass(frozen=True)
class WholeSharding:
    """Single device and DDP: every rank holds everything.

    Args:
        strategy: Lightning's.
    """

    strategy: Strategy
    guards_steps: bool = False

    @property
    def local_weights(self) -> LocalWeights:
        return WholeWeights()

    def run_forward(self, function: Callable[[], Result]) -> Result:
        with self.strategy.precision_plugin.val_step_context():
            return function()

    def gradient_norm(self) -> Tensor | None:
        return None

    def skipped_step(self) -> bool:
        return False

    def group_names(self) -> list[list[str]]:
        module = self.strategy.lightning_module
        assert module is not None, "the trainer has no module yet"
        return names_by_group(self.strategy.optimizers[0], module)


def sharding_of(strategy: Strategy) -> Sharding:
    """Return the Protocol's object for a strategy.

    Raises:
        UserError: a strategy that splits the weights and does not implement the Protocol.
    """
    if isinstance(strategy, Sharding):
        return strategy
    if not holds_whole(type(strategy)):
        raise UserError("trainer.strategy", allowed_instead(type(strategy).__name__))
    return WholeSharding(strategy)


def names_by_group(optimizer: torch.optim.Optimizer, module: nn.Module) -> list[list[str]]:
    """Return the names of the parameters of every group of an optimizer."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    groups: list[dict[str, Any]] = optimizer.param_groups
    return [[names[id(parameter)] for parameter in group["params"]] for group in groups]
