"""Many images into a folder: by several processes, and from where it stopped when it was killed."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mhla_lightning.errors import UserError
from mhla_lightning.generation.images import Drawing, ImageRun, batches, check_drawing, draw_batch, find_image_run, load_task
from mhla_lightning.runs.folder import FORMAT, read_json, write_json

SETTINGS, PARTS, IMAGES = "settings.json", "parts", "samples.npz"


@dataclass(frozen=True)
class ImageJob:
    """What to draw.

    Attributes:
        found: the run.
        labels: class of image 0, 1, ...
        drawing: how.
        batch_size: images at once.
    """

    found: ImageRun
    labels: tuple[int, ...]
    drawing: Drawing
    batch_size: int

    def settings(self) -> dict[str, Any]:
        """All that the images depend on, as JSON gives it back."""
        step = self.found.checkpoint.name
        weights = {"run": self.found.run.run_id, "checkpoint": step, "averaged": self.found.averaged, "file": _identity(self.found.weights.path)}
        settings = {"format": FORMAT, **weights, **asdict(self.drawing), "batch_size": self.batch_size, "labels": self.labels}
        return json.loads(json.dumps(settings))

    def name(self) -> str:
        """`step-00001200-<8 hex of the settings>`."""
        digest = hashlib.sha256(json.dumps(self.settings(), sort_keys=True).encode()).hexdigest()
        return f"{self.found.checkpoint.name}-{digest[:8]}"


def draw_images(job: ImageJob, folder: Path, processes: int, device: torch.device, on_batch: Callable[[int], Any]) -> np.ndarray:
    """Draws what `folder` does not hold yet and writes samples.npz there: arr_0 the images, arr_1 their labels, as ADM's evaluation reads them.

    Args:
        processes: they share the cores; on several GPUs each takes its own in turn.
        on_batch: called with how many images an earlier attempt has left, then with those of every batch that is done.

    Returns:
        uint8 (images, H, W, 3)

    Raises:
        UserError: what cannot be drawn, or a folder that holds other images.
    """
    check_drawing(job.found, job.labels, job.drawing)
    _claim(job, folder)
    parts = {images: folder / PARTS / f"{images.start:08d}.npy" for images in batches(len(job.labels), job.batch_size)}
    missing = [(images, file) for images, file in parts.items() if not file.is_file()]
    on_batch(len(job.labels) - sum(len(batch) for batch, _ in missing))
    if missing and processes == 1:
        task = load_task(job.found, device)
        for batch, file in missing:
            _write(file, draw_batch(job.found, task, job.labels, batch, job.drawing))
            on_batch(len(batch))
    elif missing:
        _draw_in_processes(job, missing, processes, device, on_batch)
    images = np.concatenate([np.load(file, allow_pickle=False) for file in parts.values()])
    temporary = folder / f".{IMAGES}"
    with temporary.open("wb") as out:
        np.savez(out, arr_0=images, arr_1=np.array(job.labels, np.int64))
    os.replace(temporary, folder / IMAGES)
    return images


def _claim(job: ImageJob, folder: Path) -> None:
    """Makes the folder for these images. Raises UserError where it holds others."""
    held = read_json(folder / SETTINGS)
    if held is None and folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} holds something else than samples; name an empty or a new folder with --out")
    settings = job.settings()
    if held is not None and held != settings:
        changed = ", ".join(key for key in settings if held.get(key) != settings[key])
        raise UserError(f"{folder} holds images drawn otherwise ({changed}); name another folder with --out")
    try:
        (folder / PARTS).mkdir(parents=True, exist_ok=True)
        write_json(folder / SETTINGS, settings)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}; choose another with --out") from error


def _draw_in_processes(
    job: ImageJob, missing: list[tuple[range, Path]], processes: int, device: torch.device, on_batch: Callable[[int], Any]
) -> None:
    context = multiprocessing.get_context("spawn")  # a fork would inherit CUDA and torch's thread pool
    ranks = context.Queue()
    for rank in range(processes):
        ranks.put(rank)
    found = job.found
    arguments = (str(found.run.path), str(found.checkpoint), found.averaged, device, torch.get_num_threads() // processes, ranks)
    with ProcessPoolExecutor(processes, context, _begin, arguments) as pool:
        waiting = {pool.submit(_draw, job.labels, batch, job.drawing, file): batch for batch, file in missing}
        try:
            for future in as_completed(waiting):
                future.result()
                on_batch(len(waiting[future]))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


_worker: dict[str, Any] = {}
"""The run and the loaded task of a drawing process."""


def _begin(run: str, checkpoint: str, averaged: bool, device: torch.device, threads: int, ranks: Any) -> None:
    torch.set_num_threads(max(1, threads))
    rank = ranks.get()
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", rank % torch.cuda.device_count())
    found = find_image_run(run, ckpt=checkpoint, ema=averaged)
    _worker.update(found=found, task=load_task(found, device))


def _draw(labels: tuple[int, ...], images: range, drawing: Drawing, file: Path) -> None:
    _write(file, draw_batch(_worker["found"], _worker["task"], labels, images, drawing))


def _write(file: Path, images: np.ndarray) -> None:
    temporary = file.with_name(f".{file.name}-{os.getpid()}")
    with temporary.open("wb") as out:
        np.save(out, images)
    os.replace(temporary, file)


def _identity(path: Path) -> str:
    """Tells a file from another of the same name without reading it."""
    facts = path.stat()
    return f"{facts.st_size}-{facts.st_mtime_ns}"
