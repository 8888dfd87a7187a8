"""Draw many images into a folder with several processes; a stopped job continues."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mhla_lightning.inference.diffusion.images import (
    Drawing,
    ImageRun,
    check_drawing,
    draw_batch,
    find_image_run,
    load_task,
)
from mhla_lightning.inference.diffusion.parts import (
    Draw,
    batches,
    claim,
    draw_parts,
    drawn_part,
    part_file,
    read_npy,
    write_npy,
)
from mhla_lightning.runs.folder import replacing

IMAGES = "samples.npz"


@dataclass(frozen=True)
class ImageJob:
    """Which images to draw.

    Attributes:
        found: the run.
        labels: class of image 0, 1, ...
        drawing: seed, sampler and guidance.
        batch_size: images drawn at once.
    """

    found: ImageRun
    labels: tuple[int, ...]
    drawing: Drawing
    batch_size: int

    def settings(self) -> dict[str, Any]:
        """Return everything that the images depend on, as JSON values."""
        return json.loads(
            json.dumps(
                {
                    **self.found.identity(),
                    **asdict(self.drawing),
                    "batch_size": self.batch_size,
                    "labels": self.labels,
                }
            )
        )


def draw_images(
    job: ImageJob, folder: Path, processes: int, device: torch.device, on_batch: Callable[[int], Any]
) -> np.ndarray:
    """Draw the images that `folder` lacks and write samples.npz there.

    samples.npz holds the images as arr_0 and their labels as arr_1, as ADM's evaluation reads them.

    Args:
        job: the images.
        folder: made where it does not exist.
        processes: number of processes; they share the cores, and the GPUs if there are several.
        device: where the images are drawn.
        on_batch: called with the number of images that an earlier attempt has left, then with the number of
            each finished batch.

    Returns:
        uint8 (images, H, W, 3)

    Raises:
        UserError: settings that cannot be drawn, or a folder with other images.
    """
    check_drawing(job.found, job.labels, job.drawing)
    claim(folder, job.settings(), "images")
    parts = {images: part_file(folder, images) for images in batches(len(job.labels), job.batch_size)}
    missing = [images for images, file in parts.items() if read_npy(file) is None]
    on_batch(len(job.labels) - sum(map(len, missing)))
    make = partial(
        _open,
        str(job.found.run.path),
        str(job.found.checkpoint),
        job.found.averaged,
        job.found.size,
        job.labels,
        job.drawing,
        folder,
    )
    draw_parts(make, missing, processes, device, on_batch)
    images = np.concatenate([drawn_part(file) for file in parts.values()])
    with replacing(folder / IMAGES) as temporary, temporary.open("wb") as out:
        np.savez(out, arr_0=images, arr_1=np.array(job.labels, np.int64))
    return images


def _open(
    run: str,
    checkpoint: str,
    averaged: bool,
    size: tuple[int, int] | None,
    labels: tuple[int, ...],
    drawing: Drawing,
    folder: Path,
    device: torch.device,
) -> Draw:
    found = find_image_run(run, ckpt=checkpoint, ema=averaged, size=size)
    task = load_task(found, device)
    return lambda images: write_npy(
        part_file(folder, images), draw_batch(found, task, labels, images, drawing)
    )
