"""The length of a run in optimizer steps."""

from __future__ import annotations

from mhla_lightning.config.resolve import Resolved
from mhla_lightning.data.batching import steps_for_epochs
from mhla_lightning.errors import UserError, inside


def length(recipe: Resolved) -> int:
    """Return the optimizer steps of a run, from `trainer.max_steps` or `data.epochs`.

    Raises:
        UserError: both or neither are set.
    """
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
