"""The files of a checkpoint folder, by rank."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
from safetensors.torch import save_file

from mhla_lightning.callbacks.ema import EMA
from mhla_lightning.checkpoints import average
from mhla_lightning.checkpoints.io import RunCheckpointIO
from mhla_lightning.checkpoints.rng import rng_state
from mhla_lightning.checkpoints.saving import Parts, copied, tensor_bytes
from mhla_lightning.checkpoints.source import FILE
from mhla_lightning.strategies.local import Fragment, LocalWeights
from mhla_lightning.strategies.sharding import sharding_of
from mhla_lightning.strategies.state import saved_bytes, saved_lots, stretches, whole_numbers
from mhla_lightning.weights.rank_files import FOLDER, WEIGHT, Stretch, file_name, write_rank_file


def files_of(trainer: pl.Trainer, folder: Path, averages: Sequence[EMA], recipe: str, later: bool) -> Parts:
    """Return the files that this rank writes; every rank calls it.

    Collectives happen here, not while the files are written.

    Args:
        trainer: of the run.
        folder: the unfinished checkpoint folder.
        averages: the callbacks whose files belong in it.
        recipe: the resolved recipe as YAML.
        later: take copies, because training continues before the files are written.
    """
    rank, rank_file = trainer.global_rank, file_name(trainer.global_rank, trainer.world_size)
    parts, local = Parts(folder, rank), sharding_of(trainer.strategy).local_weights
    with ExitStack() as kept:
        for ema in averages:
            kept.enter_context(ema.kept_beside())
        trainer.save_checkpoint(folder / FILE)
    if rank == 0:
        checkpoint, write = cast(RunCheckpointIO, trainer.strategy.checkpoint_io).take(
            copied if later else _unchanged
        )
        parts.add(FILE, tensor_bytes(checkpoint), write)
        parts.add("recipe.yaml", 0, lambda path: _write_text(path, recipe))
    if local.sharded:
        _add_lots(parts, trainer, local, later)
    for ema in averages:
        own = ema.stretches(trainer, trainer.lightning_module)
        if local.sharded:
            _add_stretches(parts, f"{average.FOLDER}/{rank_file}", own, later)
        elif rank == 0:
            whole = {part.name: part.tensors[WEIGHT].view(part.shape) for part in own}
            _add_tensors(parts, f"{average.FOLDER}/{average.WHOLE}", copied(whole) if later else whole)
    _add_tensors(parts, f"rng/rank-{rank}.safetensors", rng_state())
    return parts


def _unchanged(values: Any) -> Any:
    return values


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _add_lots(parts: Parts, trainer: pl.Trainer, local: LocalWeights, later: bool) -> None:
    """Add weights and optimizer state, one file for each lot that is in memory at one time.

    Numbers on a disk are read when their file is written.
    """
    module, optimizer = trainer.lightning_module, trainer.optimizers[0]
    lots = saved_lots(local, module)
    for number, lot in enumerate(lots):
        name = f"{FOLDER}/{file_name(trainer.global_rank, trainer.world_size, number, len(lots))}"
        numbers = whole_numbers(module) if number == 0 and parts.rank == 0 else []
        if later or len(lots) == 1:
            with local.loaded(lot) as fragments:
                _add_stretches(parts, name, [*stretches(fragments, optimizer), *numbers], later)
        else:
            parts.add(name, saved_bytes(lot, optimizer), partial(_write_lot, local, lot, optimizer, numbers))


def _write_lot(
    local: LocalWeights, lot: list[Fragment], optimizer: Any, more: list[Stretch], path: Path
) -> None:
    with local.loaded(lot) as fragments:
        write_rank_file(path, [*stretches(fragments, optimizer), *more])


def _add_stretches(parts: Parts, name: str, own: list[Stretch], later: bool) -> None:
    kept = (
        [Stretch(part.name, part.shape, part.start, copied(dict(part.tensors)), part.scalars) for part in own]
        if later
        else own
    )
    parts.add(
        name, tensor_bytes([dict(part.tensors) for part in kept]), lambda path: write_rank_file(path, kept)
    )


def _add_tensors(parts: Parts, name: str, tensors: dict[str, Any]) -> None:
    parts.add(name, tensor_bytes(tensors), lambda path: save_file(tensors, path))
