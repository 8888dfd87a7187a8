"""Work of the host ahead of a step, so that neither a GPU nor the host waits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

Draw = Callable[[Mapping[str, Any]], dict[str, Tensor]]
"""From a batch on the host to the tensors that are added to it. Workers of some start methods pickle it."""
# Parts of a batch that the host alone reads.
ON_HOST = ("index", "epoch", "source", "skipped")


@runtime_checkable
class WorksAhead(Protocol):
    """A LightningModule whose steps need work of the host."""

    def draws_ahead(self, training: bool) -> Draw | None:
        """Return what draws the random numbers of every batch; None draws nothing.

        Args:
            training: whether the batches are to train, not to validate or test.
        """
        ...

    def kept_on_host(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return further entries of the moved batch that the step reads on the host."""
        ...


@runtime_checkable
class EvaluatesSizes(Protocol):
    """A LightningModule that is evaluated at several sizes of samples."""

    eval_sizes: tuple[tuple[int, ...], ...]
    """Sizes besides the trained one, along each axis."""
