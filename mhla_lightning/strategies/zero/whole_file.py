"""Lightning's own checkpoint files from weights that are split among ranks."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins import TorchCheckpointIO

from mhla_lightning.checkpoints.source import FILE, ShardedSource, open_source
from mhla_lightning.strategies.sharding import sharding_of
from mhla_lightning.strategies.state import (
    LOSS_SCALE,
    loss_scale,
    optimizer_groups,
    saved_lots,
    stretches,
    whole_numbers,
)
from mhla_lightning.weights.moments import GROUPS
from mhla_lightning.weights.rank_files import FOLDER, file_name, write_rank_file

_OPTIMIZERS = "optimizer_states"


def save_whole(trainer: pl.Trainer, checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint as one device would; every rank calls it.

    Each rank writes its part into a folder beside the file, and rank 0 puts them together. So no rank but 0
    holds more than its part, and the file fits every strategy and number of ranks.

    Args:
        trainer: that trains or evaluates.
        checkpoint: Lightning's dict, without weights and optimizer.
        path: of the file, on a disk that all ranks share.
    """
    strategy, module = trainer.strategy, trainer.lightning_module
    local, rank = sharding_of(strategy).local_weights, trainer.global_rank
    if not local.sharded:  # outside of training every rank holds all weights
        if rank == 0:
            whole = {**checkpoint, "state_dict": module.state_dict()}
            strategy.checkpoint_io.save_checkpoint(whole, path)
        strategy.barrier()
        return
    parts = path.with_name(f".{path.name}.parts")
    if rank == 0:
        shutil.rmtree(parts, ignore_errors=True)
        (parts / FOLDER).mkdir(parents=True)
    strategy.barrier()
    optimizer: Any = trainer.optimizers[0]
    lots = saved_lots(local, module)
    for number, lot in enumerate(lots):
        name = file_name(rank, trainer.world_size, number, len(lots))
        more = whole_numbers(module) if number == 0 and rank == 0 else []
        with local.loaded(lot) as fragments:
            write_rank_file(parts / FOLDER / name, [*stretches(fragments, optimizer), *more])
    strategy.barrier()
    if rank == 0:
        scale = loss_scale(optimizer)
        rest = {**checkpoint, GROUPS: optimizer_groups(trainer), **({LOSS_SCALE: scale} if scale else {})}
        TorchCheckpointIO().save_checkpoint(rest, parts / FILE)  # at once, whatever the plugin does
        source = open_source(parts / FILE)
        assert isinstance(source, ShardedSource)
        whole = source.as_whole()
        if _OPTIMIZERS not in checkpoint:  # save_weights_only
            del whole[_OPTIMIZERS]
        strategy.checkpoint_io.save_checkpoint(whole, path)
        shutil.rmtree(parts)
    strategy.barrier()
