"""The message of a run that has run out of memory, with changes that would fit."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl
import torch

from mhla_lightning.config.resolve import Resolved, resolve
from mhla_lightning.strategies.config import strategy_name

log = logging.getLogger(__name__)
# torch has a class for GPUs only; on a CPU its allocators and the C++ library leave no more than these words.
_REFUSED = re.compile(
    r"can't allocate memory|not enough memory|out of memory|bad_alloc|ALLOC_FAILED", re.IGNORECASE
)
_SHOWN = 3  # changes that would fit
_LESS = {
    "zero1": ("zero2", "zero3"),
    "zero2": ("zero3", "zero3_offload"),
    "zero2_offload": ("zero3_offload",),
    "zero3": ("zero3_offload",),
    "zero3_offload": ("zero3_nvme",),
    "zero3_nvme": (),
}
"""A strategy -> those that keep less on a GPU, the nearest first."""
_LESS_THAN_WHOLE = ("zero1", "zero2", "zero3")  # for strategies that keep all weights on every rank


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory ran out, on a GPU or on the CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and _REFUSED.search(str(error)) is not None


class MemorySnapshot(pl.Callback):
    """Writes what a GPU's memory holds when it runs out, before the trainer frees it.

    The files are `memory/rank-N.txt`, torch's summary, and `memory/rank-N.json`, every block by
    torch.cuda.memory_snapshot. The error that is being handled is never hidden: what fails here is logged.

    Args:
        folder: of the run.

    Attributes:
        files: what was written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "memory"
        self.files: list[Path] = []

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        if not isinstance(exception, torch.OutOfMemoryError):
            return
        for suffix, text in (("txt", _summary), ("json", _blocks)):
            path = self.folder / f"rank-{trainer.global_rank}.{suffix}"
            try:
                self.folder.mkdir(exist_ok=True)
                path.write_text(text(), encoding="utf-8")
            except Exception as problem:  # noqa: BLE001
                # The disk may be full, and the GPU's driver may fail: the run's own error must come out.
                log.warning(f"{path.name}: the memory's state could not be written: {problem}")
            else:
                self.files.append(path)


def _summary() -> str:
    return torch.cuda.memory_summary()


def _blocks() -> str:
    return json.dumps(torch.cuda.memory_snapshot(), default=str)


def out_of_memory(
    recipe: Resolved,
    step: int,
    ranks: int,
    nodes: int,
    error: BaseException,
    snapshot: Sequence[Path] = (),
) -> str:
    """Return the message: the batch, the tokens, the strategy, and changes that would fit.

    Args:
        recipe: of the run.
        step: optimizer steps done.
        ranks, nodes: processes and machines of the run.
        error: the exception that was raised.
        snapshot: files that show the memory when it ran out.
    """
    micro, accumulation = recipe.data.micro_batch(ranks)
    tokens = torch.Size(recipe.task.grid).numel()
    strategy = strategy_name(recipe.trainer.get("strategy", "auto")) or "trainer.strategy's class"
    parts = f"{ranks} rank{'s' * (ranks > 1)} x {micro} x {accumulation} accumulated"
    spread = (
        f"`data.micro_batch_size` {micro} (`data.batch_size` {recipe.data.batch_size} = {parts}), "
        f"{tokens:,} tokens a sample"
    )
    kept = recipe.task.checkpoint_activations
    model = (
        f"{recipe.task.parameter_count:,} parameters under {strategy}, `model.checkpoint_activations` {kept}"
    )
    shown = f"; the memory as it ran out: {', '.join(map(str, snapshot))}" if snapshot else ""
    return (
        f"out of memory after step {step} with {spread}, {model}; {_advice(recipe, ranks, nodes, micro)} "
        f"({_short(error)}){shown}"
    )


def _short(error: BaseException) -> str:
    return " ".join(str(error).split()).split(". ")[0][:160] or type(error).__name__


def _advice(recipe: Resolved, ranks: int, nodes: int, micro: int) -> str:
    try:
        return _estimated(recipe, ranks, nodes)
    except Exception as problem:  # noqa: BLE001
        # The estimate is an extra, and memory is short: the message must appear without it, too.
        log.debug(f"no estimate: {problem}")
        return _by_rule(recipe, ranks, micro)


def _estimated(recipe: Resolved, ranks: int, nodes: int) -> str:
    """Changes that would fit, by the estimate of `mhla plan`."""
    from mhla_lightning.planning.gpus import GPU
    from mhla_lightning.planning.plan import make_plan  # needed here alone, and memory is short

    name, memory = _device(ranks // nodes)
    fresh = resolve(recipe.values)  # the run's own task holds weights
    plan = make_plan(fresh, nodes=nodes, gpus_per_node=ranks // nodes, gpu=GPU(name, memory))
    asked = plan.stages[plan.strategy].total if plan.strategy is not None else None
    if asked is None or not plan.advice:
        raise LookupError("the estimate sees no lack")
    return (
        f"it takes about {asked / 2**30:.1f} GiB of the {memory / 2**30:.1f} GiB of {name}; these would "
        f"fit: {'; or '.join(plan.advice[:_SHOWN])}"
    )


def _device(ranks: int) -> tuple[str, int]:
    """(name, bytes) of the memory that a rank trains in; `ranks` share this machine."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(), torch.cuda.get_device_properties(
            torch.cuda.current_device()
        ).total_memory
    return "this machine's memory for a rank", os.sysconf("SC_PAGE_SIZE") * os.sysconf(
        "SC_PHYS_PAGES"
    ) // ranks


def _by_rule(recipe: Resolved, ranks: int, micro: int) -> str:
    """Changes that take less memory, the cheapest first, where there is no estimate."""
    mine = recipe.data.batch_size // ranks
    smaller = next((size for size in range(micro - 1, 0, -1) if mine % size == 0), None)
    changes = [f"`data.micro_batch_size` {smaller}"] if smaller else []
    if recipe.task.checkpoint_activations == "none":
        changes.append("`model.checkpoint_activations` blocks")
    name = strategy_name(recipe.trainer.get("strategy", "auto"))
    changes += [
        f"`trainer.strategy` {stage}" for stage in _LESS.get(str(name), _LESS_THAN_WHOLE if ranks > 1 else ())
    ]
    return (
        f"these take less: {', or '.join(changes)}"
        if changes
        else "take a smaller model, or a GPU with more memory"
    )
