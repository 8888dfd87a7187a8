"""Draw many samples into a folder batch by batch, with several processes.

A job that was stopped continues with the batches that are missing.
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
"""Draws the samples of these numbers and stores the batch, either completely or not at all."""


def batches(count: int, size: int) -> list[range]:
    """Return the sample numbers of every batch."""
    return [range(first, min(count, first + size)) for first in range(0, count, size)]


def part_file(folder: Path, batch: range) -> Path:
    """Return the file of a batch in the job's folder."""
    return folder / PARTS / f"{batch.start:08d}.npy"


def job_name(checkpoint: Path, settings: dict[str, Any]) -> str:
    """Return `step-00001200-<8 hex of the settings>`: equal settings give equal folders."""
    return (
        f"{checkpoint.name}-{hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]}"
    )


def claim(folder: Path, settings: dict[str, Any], kind: str) -> None:
    """Make the folder for samples of these settings, or check that it holds such samples.

    Args:
        folder: new, empty, or left by an earlier attempt.
        settings: everything that the samples depend on, as JSON values.
        kind: what the samples are, for messages: "images".

    Raises:
        UserError: the folder holds other samples or files, or cannot be written.
    """
    held = read_json(folder / SETTINGS)
    if held is None and folder.is_dir() and any(folder.iterdir()):
        raise UserError(
            str(folder), "this folder holds other files than samples; name an empty or a new folder"
        )
    if held is not None and held != settings:
        changed = ", ".join(key for key in {**settings, **held} if held.get(key) != settings.get(key))
        raise UserError(
            str(folder),
            f"this folder holds {kind} drawn with other settings ({changed}); name another folder",
        )
    try:
        (folder / PARTS).mkdir(parents=True, exist_ok=True)
        write_json(folder / SETTINGS, settings)
    except OSError as error:
        raise UserError(
            str(folder), f"this folder cannot be written ({error.strerror}); choose another"
        ) from error


def draw_parts(
    make: Callable[[torch.device], Draw],
    missing: Sequence[range],
    processes: int,
    device: torch.device,
    on_batch: Callable[[int], Any],
) -> None:
    """Draw batches in this process or in several.

    Args:
        make: loads the model on a device and returns the function that draws; with several processes it is
            sent to each and must be picklable.
        missing: the batches to draw.
        processes: number of processes; they share the cores, and the GPUs if there are several.
        device: where samples are drawn.
        on_batch: called with the number of samples of each finished batch.
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
    """Return the threads of each process, a power of two.

    With another number torch splits tensors within its vector width, and the last bits differ.
    """
    return 1 << (max(1, torch.get_num_threads() // processes).bit_length() - 1)


_worker: dict[str, Draw] = {}
"""The function that draws, in a process of the pool."""


def _begin(make: Callable[[torch.device], Draw], device: torch.device, threads: int, ranks: Any) -> None:
    torch.set_num_threads(threads)
    rank = ranks.get()
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", rank % torch.cuda.device_count())
    _worker["draw"] = make(device)


def _draw(batch: range) -> None:
    _worker["draw"](batch)


def write_npy(file: Path, array: np.ndarray) -> None:
    """Write an array completely or not at all; other processes may write the same file."""
    temporary = file.with_name(f".{file.name}-{os.getpid()}")
    with temporary.open("wb") as out:
        np.save(out, array)
    os.replace(temporary, file)
