"""The length of a run in optimizer steps."""

from __future__ import annotations

from mhla_lightning.config.resolve import Resolved
from mhla_lightning.data.batching import steps_for_epochs
from mhla_lightning.errors import UserError, inside


def length(recipe: Resolved) -> int:
    """Return the optimizer steps of a run, from `trainer.max_steps` or `data.epochs`.

    Raises:
        UserError: both or neither are set, or the run would end before `trainer.min_steps`.
    """
    steps, least = _steps(recipe), recipe.trainer.get("min_steps") or 0
    if least > steps:
        raise UserError(
            "trainer.min_steps", f"it is {least}, and the run has {steps} steps: lower it, or train longer"
        )
    return steps


def _steps(recipe: Resolved) -> int:
    steps, epochs = recipe.trainer.get("max_steps", -1), recipe.data.epochs
    if steps > 0 and epochs is not None:
        raise UserError(
            "trainer.max_steps",
            f"it is {steps} and `data.epochs` is {epochs}: a run has one length, so set one of them to null",
        )
    if steps > 0:
        return int(steps)
    if epochs is None:
        raise UserError("trainer.max_steps", "the recipe has no length: set this or `data.epochs`")
    with inside("data"):
        return steps_for_epochs(epochs, recipe.data.samples, recipe.data.batch_size)
