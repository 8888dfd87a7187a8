"""Search for the first layer whose numbers are not finite."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from mhla_lightning.checkpoints.saving import tensors_in
from mhla_lightning.strategies.sharding import sharding_of


def first_layer(
    trainer: pl.Trainer, pl_module: pl.LightningModule, batches: Sequence[tuple[Any, int]]
) -> str:
    """Run batches again, forward and backward, and return a clause that names the layer.

    Every rank calls it with the same number of batches. A failure of one rank is returned, not raised.
    Gradients stay in the parameters. Dropout draws new masks, so the search may find nothing.

    Args:
        trainer: of the run.
        pl_module: its module.
        batches: of one training step, with their numbers.
    """
    for batch, number in batches:
        with _watching(pl_module) as search:
            loss = search.attempt(lambda batch=batch, number=number: _loss(trainer, pl_module, batch, number))  # type: ignore[misc]
            if found := _agreed(trainer, search):
                return found
            search.attempt(lambda loss=loss: trainer.strategy.backward(loss, None))  # type: ignore[misc]
            if found := _agreed(trainer, search):
                return found
    return "a second forward and backward over the same samples was finite in every layer"


def _loss(trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, number: int) -> Tensor:
    output = sharding_of(trainer.strategy).run_forward(lambda: pl_module.training_step(batch, number))
    return cast(Mapping[str, Tensor], output)["loss"] if not isinstance(output, Tensor) else output


class _Search:
    """Hooks of one search in this process.

    Attributes:
        found: a clause; empty while nothing was found.
    """

    def __init__(self) -> None:
        self.found = ""

    def attempt(self, function: Callable[[], Any]) -> Any:
        try:
            return function()
        except RuntimeError as error:  # such as too little memory; the step's own error matters more
            reason = " ".join(str(error).split())[:200]
            self.found = self.found or f"the search for the layer failed: {reason}"
            return None

    def after_forward(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Judge a layer's output, as a forward hook. Inner layers come before their layer."""
        if not self.found and not _finite([output]):
            already = "" if _finite([args, kwargs]) else ", and its input is not finite either"
            self.found = f"the first layer whose output is not finite is {name}{already}"
        for tensor in tensors_in([args, kwargs, list(module.parameters(recurse=False))]):
            if tensor.requires_grad:
                tensor.register_hook(partial(self.in_backward, name))

    def in_backward(self, name: str, gradient: Tensor) -> None:
        """Judge a gradient, as a hook on a layer's inputs and weights.

        Layers come from the last to the first, inner ones before outer ones.
        """
        if not self.found and not _finite([gradient]):
            self.found = f"the forward is finite, and the backward stops being finite at {name}"


@contextmanager
def _watching(pl_module: nn.Module) -> Iterator[_Search]:
    search = _Search()
    with ExitStack() as hooks, torch.compiler.set_stance("force_eager"):  # compiled code calls no hooks
        for name, module in pl_module.named_modules():
            if name:
                handle = module.register_forward_hook(partial(search.after_forward, name), with_kwargs=True)
                hooks.callback(handle.remove)
        yield search


def _agreed(trainer: pl.Trainer, search: _Search) -> str:
    """Return the finding of the lowest rank that has one, on every rank; empty where none has."""
    if trainer.world_size == 1:
        return search.found
    found: list[str] = [""] * trainer.world_size
    torch.distributed.all_gather_object(found, search.found)
    return next((f"{clause} (rank {rank})" for rank, clause in enumerate(found) if clause), "")


def _finite(values: Sequence[Any]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors_in(values) if tensor.is_floating_point())
