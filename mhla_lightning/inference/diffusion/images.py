"""Images from a diffusion run: image i of a seed is the same in any batch and on any number of processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch

from mhla_lightning.data.modules.images import ImageDataModule
from mhla_lightning.data.modules.latents import LatentDataModule
from mhla_lightning.diffusion import Guidance, check_sampler
from mhla_lightning.errors import UserError
from mhla_lightning.inference.diffusion.drawing import Key, draw_samples
from mhla_lightning.inference.diffusion.parts import batches
from mhla_lightning.inference.rebuilding import load_backbone, rebuild
from mhla_lightning.inference.weights import FoundRun, find_weights
from mhla_lightning.runs.folder import find_run, runs_root
from mhla_lightning.tasks.image_diffusion import ImageDiffusionTask

Pixels = ImageDataModule | LatentDataModule


@dataclass(frozen=True)
class ImageRun(FoundRun):
    """A run of an image diffusion model.

    Attributes:
        task: built from recipe.yaml, without weights.
        data: what makes pixels of its samples; no shards are opened.
    """

    task: ImageDiffusionTask
    data: Pixels


@dataclass(frozen=True)
class Drawing:
    """How images are drawn.

    Attributes:
        seed: with the number of an image it gives its noise.
        sampler, steps: see diffusion.SAMPLERS.
        guidance: scale of classifier-free guidance, on which channels and in which part of the time axis.
    """

    seed: int = 0
    sampler: str = "ddpm"
    steps: int = 250
    guidance: Guidance = Guidance(1.0)  # noqa: RUF009  frozen


def find_image_run(run: str, runs: str | None = None, ckpt: str | None = None, ema: bool = True) -> ImageRun:
    """Finds a run and its checkpoint, and builds the task without weights.

    Args:
        run: id or folder.
        runs: where run folders live; None is $MHLA_RUNS, else ./runs.
        ckpt: a step, or a checkpoint folder; None is the newest.
        ema: take the average where the checkpoint has one.

    Raises:
        UserError: no such run or checkpoint, no image diffusion model.
    """
    folder = find_run(run, runs_root(runs))
    built = rebuild(folder, ImageDiffusionTask, "sampling images needs an image diffusion model")
    return ImageRun(
        folder,
        find_weights(folder, ckpt, ema),
        cast(ImageDiffusionTask, built.task),
        cast("Pixels", built.data),
    )


def load_task(found: ImageRun, device: torch.device | str) -> ImageDiffusionTask:
    """The task with its weights, in eval mode, on `device`.

    Raises:
        UserError: weights of another model.
    """
    return load_backbone(found.task, found.weights, device)


def sample_images(
    found: ImageRun, task: ImageDiffusionTask, labels: Sequence[int], drawing: Drawing, batch_size: int = 64
) -> np.ndarray:
    """Draws one image for each label.

    Args:
        task: of `found`, loaded.
        labels: class of image 0, 1, ...
        batch_size: images at once. The same images come for any; the same bits for the same.

    Returns:
        uint8 (images, H, W, 3)

    Raises:
        UserError: an unknown sampler or class.
    """
    check_drawing(found, labels, drawing)
    return np.concatenate(
        [draw_batch(found, task, labels, images, drawing) for images in batches(len(labels), batch_size)]
    )


def check_drawing(found: ImageRun, labels: Sequence[int], drawing: Drawing) -> None:
    """Raises UserError for what cannot be drawn."""
    check_sampler(drawing.sampler, found.task.process, drawing.steps)
    if not labels:
        raise UserError("no image was asked for; give at least one class")
    channels = found.task.sample_shape[0]
    if (drawing.guidance.channels or 0) > channels:
        raise UserError(
            f"guidance of {drawing.guidance.channels} channels, and the samples of run "
            f"{found.run.run_id} have {channels}"
        )
    for label in labels:
        if not 0 <= label < found.task.num_classes:
            raise UserError(
                f"class {label} is unknown to run {found.run.run_id}; its classes are 0 to "
                f"{found.task.num_classes - 1}"
            )


def draw_batch(
    found: ImageRun, task: ImageDiffusionTask, labels: Sequence[int], images: range, drawing: Drawing
) -> np.ndarray:
    """uint8 (len(images), H, W, 3): the images of these numbers. task: loaded. labels: of all images."""
    wanted = torch.tensor([labels[image] for image in images])
    keys: list[Key] = [(drawing.seed, "sample", image) for image in images]
    return (
        found.data.to_images(draw_samples(task, wanted, task.null_label, task.sample_shape, keys, drawing))
        .cpu()
        .numpy()
    )
