"""Sources to shards: the same input and seed give the same bytes, and a killed run leaves nothing that looks whole."""

from __future__ import annotations

import math
import random
from pathlib import Path

from mhla_lightning.data.index import SPLITS, ShardIndex
from mhla_lightning.data.replacing import new_folder
from mhla_lightning.data.shards import Progress, write_split
from mhla_lightning.data.sources import Source, Split, open_source
from mhla_lightning.errors import UserError

DEFAULT_VAL = 0.2  # share held out when the source has no val part and none is asked for


def pack(
    source: str | Path,
    to: str | Path,
    *,
    val: int | float | None = None,
    shards: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> dict[str, ShardIndex]:
    """Write `source` (see sources.open_source) as shards under `to`, in an order shuffled by `seed`, and return the index of every split.

    val: samples (int) or share (float below 1) held out for validation; only for a source without a val part of its own. shards: number of
    training shards; None takes enough for 512 MB each, at least 16. overwrite: replace `to` if it holds shards.
    Raises UserError for a bad argument or a target in use, DataError for a bad source.
    """
    if shards is not None and shards < 1:
        raise UserError(f"--shards is {shards}; it must be at least 1")
    with new_folder(Path(to).absolute(), overwrite) as folder:
        opened = open_source(source)
        plans = _plan(opened, val, seed)
        return {
            name: write_split(folder / name, opened.classes, split, order, shards if name == "train" else None, on_progress)
            for name, (split, order) in plans.items()
        }


def _plan(source: Source, val: int | float | None, seed: int) -> dict[str, tuple[Split, list[int]]]:
    """For every split to write: where its samples come from, and their positions there in the order of writing."""
    orders = {name: _shuffled(len(split), f"{seed}/{name}") for name, split in source.splits.items()}
    plans = {name: (source.splits[name], orders[name]) for name in SPLITS if name in orders}
    if "val" in plans:
        if val is not None:
            raise UserError(f"--val {val} was given, but the source has its own val part with {len(source.splits['val'])} samples: leave --val out")
        return plans
    held_out = _held_out(len(orders["train"]), DEFAULT_VAL if val is None else val)
    train = source.splits["train"]
    return plans | {"train": (train, orders["train"][held_out:]), "val": (train, orders["train"][:held_out])}


def _held_out(samples: int, val: int | float) -> int:
    count = math.ceil(samples * val) if 0 < val < 1 else val
    if not (0 < count < samples and count == int(count)):
        raise UserError(f"--val is {val}; it must be a number of samples from 1 to {samples - 1}, or a share above 0 and below 1")
    return int(count)


def _shuffled(samples: int, seed: str) -> list[int]:
    order = list(range(samples))
    random.Random(seed).shuffle(order)
    return order
