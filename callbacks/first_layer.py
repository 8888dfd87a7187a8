"""Which layer of a model is the first to give numbers that are not finite."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mhla_lightning.strategies.local import run_forward


def first_layer(
    trainer: pl.Trainer, pl_module: pl.LightningModule, batches: Sequence[tuple[Any, int]]
) -> str:
    """Runs batches again, forward and then backward, and says in half a sentence where numbers stop being
    finite.

    Every rank calls it with as many batches; a rank's own failure is told, not raised. Gradients are left
    behind. Dropout draws anew: what hung on it may not come back.

    Args:
        batches: a training step's, with their numbers.
    """
    for batch, number in batches:
        with _watching(pl_module) as search:
            loss = search.attempt(lambda batch=batch, number=number: _loss(trainer, pl_module, batch, number))  # type: ignore[misc]
            if told := _tell(trainer, search):
                return told
            search.attempt(lambda loss=loss: trainer.strategy.backward(loss, None))  # type: ignore[misc]
            if told := _tell(trainer, search):
                return told
    return "a second forward and backward over the same samples was finite in every layer"


def _loss(trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, number: int) -> Tensor:
    output = run_forward(trainer, lambda: pl_module.training_step(batch, number))
    return output if isinstance(output, Tensor) else output["loss"]


class _Search:
    """What hooks have found in this process, in half a sentence."""

    def __init__(self) -> None:
        self.found = ""

    def attempt(self, function: Callable[[], Any]) -> Any:
        try:
            return function()
        except RuntimeError as error:  # out of memory, say: what was wrong before must still be told
            self.found = (
                self.found
                or f"which layer gives them could not be found: {' '.join(str(error).split())[:200]}"
            )
            return None

    def after_forward(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """A forward hook; a layer's inner layers come before it."""
        if not self.found and not _finite([output]):
            already = "" if _finite([args, kwargs]) else ", and what it is given is not either"
            self.found = f"the first layer whose output is not finite is {name}{already}"
        for tensor in _tensors([args, kwargs, list(module.parameters(recurse=False))]):
            if tensor.requires_grad:
                tensor.register_hook(partial(self.in_backward, name))

    def in_backward(self, name: str, gradient: Tensor) -> None:
        """A hook on what a layer is given and on its weights; layers come from the last to the first,
        inner ones before outer ones.
        """
        if not self.found and not _finite([gradient]):
            self.found = (
                "the forward is finite, and the first layer, going backward, whose gradients are not is "
                f"{name}"
            )


@contextmanager
def _watching(pl_module: nn.Module) -> Iterator[_Search]:
    search = _Search()
    with ExitStack() as hooks:
        for name, module in pl_module.named_modules():
            if name:
                handle = module.register_forward_hook(partial(search.after_forward, name), with_kwargs=True)
                hooks.callback(handle.remove)
        yield search


def _tell(trainer: pl.Trainer, search: _Search) -> str:
    """What was found, the same on every rank: the lowest rank's; empty where no rank found anything."""
    if trainer.world_size == 1:
        return search.found
    found: list[str] = [""] * trainer.world_size
    torch.distributed.all_gather_object(found, search.found)
    return next((f"{told} (rank {rank})" for rank, told in enumerate(found) if told), "")


def _tensors(values: Sequence[Any]) -> Iterable[Tensor]:
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


def _finite(values: Sequence[Any]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in _tensors(values) if tensor.is_floating_point())
