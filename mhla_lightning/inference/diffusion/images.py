"""Draw images from a diffusion run; the seed and the number of an image determine it.

It is the same image in any batch and with any number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import torch

from mhla_lightning.data.modules.images import ImageDataModule
from mhla_lightning.data.modules.latents import LatentDataModule
from mhla_lightning.diffusion import Guidance, check_sampler
from mhla_lightning.diffusion.drawing import Key, draw_samples
from mhla_lightning.errors import UserError
from mhla_lightning.inference.diffusion.drawing import check_guided_channels
from mhla_lightning.inference.diffusion.parts import batches
from mhla_lightning.inference.rebuilding import load_backbone, open_run, rebuild
from mhla_lightning.inference.weights import FoundRun
from mhla_lightning.tasks.image_diffusion import ImageDiffusionTask
from mhla_lightning.weights.adapted import AdaptsWeights

Pixels = ImageDataModule | LatentDataModule


@dataclass(frozen=True)
class ImageRun(FoundRun):
    """A run of an image diffusion model.

    Attributes:
        task: built from recipe.yaml, without weights.
        data: turns samples into pixels; no shards are opened.
        size: height and width in pixels; None as in training.
    """

    task: ImageDiffusionTask
    data: Pixels
    size: tuple[int, int] | None = None

    def identity(self) -> dict[str, Any]:
        """Return facts that identify these weights and the size."""
        return super().identity() | ({} if self.size is None else {"size": self.size})


@dataclass(frozen=True)
class Drawing:
    """How images are drawn.

    Attributes:
        seed: the noise of an image depends on it and on the image's number.
        sampler: name in diffusion.SAMPLERS.
        steps: of the sampler.
        guidance: scale of classifier-free guidance, its channels and its part of the time axis.
    """

    seed: int = 0
    sampler: str = "ddpm"
    steps: int = 250
    guidance: Guidance = Guidance(1.0)  # noqa: RUF009  frozen


def find_image_run(
    run: str,
    runs: str | None = None,
    ckpt: str | None = None,
    ema: bool = True,
    size: tuple[int, int] | None = None,
) -> ImageRun:
    """Find a run and its checkpoint, and build the task without weights.

    Args:
        run, runs, ckpt, ema: see :func:`open_run`.
        size: height and width of the images in pixels; None means as in training.

    Raises:
        UserError: no such run or checkpoint, no image diffusion model, or a size that it cannot draw.
    """
    opened = open_run(run, ImageDiffusionTask, _NEEDED, runs, ckpt, ema)
    task, data = opened.task, cast("Pixels", opened.data)
    if size is not None:
        with _of_the_size(size):
            wanted = data.sample_size(*size)
            other = wanted != tuple(task.sample_shape[1:])
            if other:
                resized = rebuild(
                    opened.folder, ImageDiffusionTask, _NEEDED, partial(_with_input_size, wanted)
                )
                task = cast(ImageDiffusionTask, resized.task)
        size = size if other else None
    return ImageRun(opened.folder, opened.weights, task, data, size)


_NEEDED = "sampling images needs an image diffusion model"


def _with_input_size(size: tuple[int, int], arguments: dict[str, Any]) -> dict[str, Any]:
    options = arguments.get("backbone_options") or {}
    return {**arguments, "backbone_options": {**options, "input_size": list(size)}}


@contextmanager
def _of_the_size(size: tuple[int, int]) -> Iterator[None]:
    """Name the size in errors of what cannot be built for it."""
    try:
        yield
    except UserError as error:
        raise UserError("size", f"this run cannot draw {size[0]}x{size[1]}: {error}") from error


def load_task(found: ImageRun, device: torch.device | str) -> ImageDiffusionTask:
    """Load the task's weights and return it in eval mode on `device`.

    For images of another size than in training, positions follow their formula, weights by offset between
    blocks stay, and other mixing matrices are resampled.

    Raises:
        UserError: the weights belong to another model.
    """
    if found.size is None:
        return load_backbone(found.task, found.weights, device)
    trained = rebuild(found.run, ImageDiffusionTask, _NEEDED).task
    with torch.device("meta"):
        trained.configure_model()
    if not isinstance(trained.backbone, AdaptsWeights):
        raise UserError("size", "the backbone of this run tells no token grid; leave it out")
    return load_backbone(found.task, found.weights, device, trained.backbone.geometry)


def sample_images(
    found: ImageRun, task: ImageDiffusionTask, labels: Sequence[int], drawing: Drawing, batch_size: int = 64
) -> np.ndarray:
    """Draw one image for each label.

    Args:
        found: the run.
        task: its task with weights (:func:`load_task`).
        labels: class of image 0, 1, ...
        drawing: seed, sampler and guidance.
        batch_size: images drawn at once. Any size gives the same images; the same size gives the same bits.

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
    """Check that these images can be drawn.

    Raises:
        UserError: an unknown sampler or class, no labels, or more guided channels than the samples have.
    """
    check_sampler(drawing.sampler, found.task.process, drawing.steps)
    if not labels:
        raise UserError("labels", "there are none; give at least one class")
    check_guided_channels(found.run, drawing.guidance, found.task.sample_shape[0])
    for label in labels:
        if not 0 <= label < found.task.num_classes:
            raise UserError(
                "labels",
                f"class {label} is unknown to run {found.run.run_id}; its classes are 0 to "
                f"{found.task.num_classes - 1}",
            )


def draw_batch(
    found: ImageRun, task: ImageDiffusionTask, labels: Sequence[int], images: range, drawing: Drawing
) -> np.ndarray:
    """Draw the images of these numbers: uint8 (len(images), H, W, 3).

    Args:
        found: the run.
        task: its task with weights.
        labels: class of every image of the job, not only of these.
        images: numbers of the images.
        drawing: seed, sampler and guidance.
    """
    wanted = torch.tensor([labels[image] for image in images])
    keys: list[Key] = [(drawing.seed, "sample", image) for image in images]
    return (
        found.data.to_images(draw_samples(task, wanted, task.null_label, task.sample_shape, keys, drawing))
        .cpu()
        .numpy()
    )
