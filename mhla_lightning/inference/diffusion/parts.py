"""Many samples into a folder, batch by batch: by several processes, and from where they stopped when they
were killed.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mhla_lightning.errors import UserError
from mhla_lightning.runs.folder import read_json, write_json

SETTINGS, PARTS = "settings.json", "parts"

Draw = Callable[[range], None]
"""Draws the samples of these numbers and stores them, so that they are there as a whole or not at all."""


def batches(count: int, size: int) -> list[range]:
    """Numbers of the samples of every batch."""
    return [range(first, min(count, first + size)) for first in range(0, count, size)]


def part_file(folder: Path, batch: range) -> Path:
    """Where a batch is kept, in `folder` of the samples."""
    return folder / PARTS / f"{batch.start:08d}.npy"


def job_name(checkpoint: Path, settings: dict[str, Any]) -> str:
    """`step-00001200-<8 hex of the settings>`: the same command finds the same folder."""
    return (
        f"{checkpoint.name}-{hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]}"
    )


def claim(folder: Path, settings: dict[str, Any], kind: str) -> None:
    """Makes the folder for samples of these settings, all that they depend on, as JSON gives it back.

    Args:
        kind: what the samples are: "images".

    Raises:
        UserError: it holds others, or cannot be written.
    """
    held = read_json(folder / SETTINGS)
    if held is None and folder.is_dir() and any(folder.iterdir()):
        raise UserError(
            f"{folder} holds something else than samples; name an empty or a new folder with --out"
        )
    if held is not None and held != settings:
        changed = ", ".join(key for key in {**settings, **held} if held.get(key) != settings.get(key))
        raise UserError(f"{folder} holds {kind} drawn otherwise ({changed}); name another folder with --out")
    try:
        (folder / PARTS).mkdir(parents=True, exist_ok=True)
        write_json(folder / SETTINGS, settings)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}; choose another with --out") from error


def draw_parts(
    make: Callable[[torch.device], Draw],
    missing: Sequence[range],
    processes: int,
    device: torch.device,
    on_batch: Callable[[int], Any],
) -> None:
    """Draws batches, in this process or in several.

    Args:
        make: loads what draws, on a device; with several processes it is sent to each and must be picklable.
        missing: the batches.
        processes: they share the cores; on several GPUs each takes its own in turn.
        on_batch: called with how many samples of every batch are done.
    """
    if not missing:
        return
    threads = torch.get_num_threads()
    if processes == 1:
        torch.set_num_threads(_threads(1))
        try:
            draw = make(device)
            for batch in missing:
                draw(batch)
                on_batch(len(batch))
        finally:
            torch.set_num_threads(threads)
        return
    context = multiprocessing.get_context("spawn")  # a fork would inherit CUDA and torch's thread pool
    ranks = context.Queue()
    for rank in range(processes):
        ranks.put(rank)
    with ProcessPoolExecutor(processes, context, _begin, (make, device, _threads(processes), ranks)) as pool:
        waiting = {pool.submit(_draw, batch): batch for batch in missing}
        try:
            for future in as_completed(waiting):
                future.result()
                on_batch(len(waiting[future]))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _threads(processes: int) -> int:
    """Of each process, a power of two: with others torch cuts tensors where its vectors do not end, and
    the last bits differ.
    """
    return 1 << (max(1, torch.get_num_threads() // processes).bit_length() - 1)


_worker: dict[str, Draw] = {}
"""What draws in a drawing process."""


def _begin(make: Callable[[torch.device], Draw], device: torch.device, threads: int, ranks: Any) -> None:
    torch.set_num_threads(threads)
    rank = ranks.get()
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", rank % torch.cuda.device_count())
    _worker["draw"] = make(device)


def _draw(batch: range) -> None:
    _worker["draw"](batch)


def write_npy(file: Path, array: np.ndarray) -> None:
    """Writes an array as a whole or not at all; other processes may write the same file."""
    temporary = file.with_name(f".{file.name}-{os.getpid()}")
    with temporary.open("wb") as out:
        np.save(out, array)
    os.replace(temporary, file)
