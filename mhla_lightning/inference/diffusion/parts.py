"""Draw many samples into a folder batch by batch, with several processes.

A job that was stopped continues with the batches that are missing.
"""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import re
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mhla_lightning.errors import DataError, UserError
from mhla_lightning.runs.folder import read_object, replacing, write_json

SETTINGS, PARTS, TEXT = "settings.json", "parts", "text"
_BEGUN = re.compile(rf"{PARTS}|{TEXT}|\.{re.escape(SETTINGS)}-\d+")
_SAMPLES = re.compile(
    rf"{_BEGUN.pattern}|{re.escape(SETTINGS)}|samples\.(npz|json)|(grid|sheet)\.png|\d{{4,}}-[a-z0-9-]+\.(mp4|png)|\..+-\d+"
)
"""Names in a folder of samples: before its settings are written, and after."""

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
    held = read_object(folder / SETTINGS)
    if not held and folder.is_dir():
        _begin_anew(folder)
    if held and held != settings:
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


def _begin_anew(folder: Path) -> None:
    """Remove the parts of a folder whose settings are damaged or were never written.

    Raises:
        UserError: the folder is not one of samples.
    """
    own = _SAMPLES if (folder / SETTINGS).is_file() else _BEGUN
    if not all(own.fullmatch(path.name) for path in folder.iterdir()):
        raise UserError(
            str(folder), "this folder holds other files than samples; name an empty or a new folder"
        )
    for part in (folder / PARTS).glob("[0-9]*.npy"):
        part.unlink()


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


def write_npy(file: Path, array: np.ndarray, beside: Sequence[Path] = ()) -> None:
    """Write an array completely or not at all; other processes may write the same file.

    Behind the array, where numpy reads nothing, a line of JSON holds checksums for :func:`read_npy`.

    Args:
        file: of the array.
        array: any numbers.
        beside: files in other places that belong to the array; they are written already.
    """
    content = io.BytesIO()
    np.save(content, array, allow_pickle=False)
    sums = {str(os.path.relpath(path, file.parent)): zlib.crc32(path.read_bytes()) for path in beside}
    end = json.dumps({"crc32": zlib.crc32(content.getbuffer()), "beside": sums})
    content.write(f"\n{end}\n".encode())
    with replacing(file) as temporary:
        temporary.write_bytes(content.getbuffer())


def read_npy(file: Path) -> np.ndarray | None:
    """Read an array of :func:`write_npy`.

    None where it or a file beside it is missing or damaged.
    """
    try:
        content = file.read_bytes()
        start = content.rfind(b"\n", 0, len(content) - 1)
        end = json.loads(content[start:])
        files = [(file.parent / name, crc32) for name, crc32 in end["beside"].items()]
        whole = zlib.crc32(content[:start]) == end["crc32"] and all(
            zlib.crc32(path.read_bytes()) == crc32 for path, crc32 in files
        )
        return np.load(io.BytesIO(content), allow_pickle=False) if whole else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError):
        return None


def drawn_part(file: Path) -> np.ndarray:
    """Return the array of a batch that was drawn.

    Raises:
        DataError: it is damaged meanwhile.
    """
    found = read_npy(file)
    if found is None:
        raise DataError(
            str(file), "this part was damaged while others were drawn; give the same command again"
        )
    return found
