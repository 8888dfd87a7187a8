"""Draw images of prompts from a text-to-image run into a folder.

A stopped job continues. The seed and the number of an image determine it: it is the same image in any batch
and with any number of processes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from PIL import Image

from mhla_lightning.diffusion import Guidance, check_sampler
from mhla_lightning.diffusion.drawing import Key, draw_samples
from mhla_lightning.errors import UserError
from mhla_lightning.inference.diffusion.drawing import check_guided_channels
from mhla_lightning.inference.diffusion.parts import Draw, drawn_part, part_file, write_npy
from mhla_lightning.inference.diffusion.prompted import JobPlace, PromptedJob, draw_prompted
from mhla_lightning.inference.diffusion.prompts import Prompt
from mhla_lightning.inference.diffusion.video_files import file_name
from mhla_lightning.inference.rebuilding import load_backbone, open_run
from mhla_lightning.inference.weights import FoundRun
from mhla_lightning.runs.folder import FORMAT, replacing, write_json
from mhla_lightning.tasks import TextToImageTask

if TYPE_CHECKING:
    from mhla_lightning.data.modules.latents import LatentDataModule

LIST = "samples.json"


@dataclass(frozen=True)
class TextImageRun(FoundRun):
    """A run of a text-to-image model.

    Attributes:
        task: built from recipe.yaml, without weights.
        data: encodes prompts and turns samples into pixels; no shards are opened.
    """

    task: TextToImageTask
    data: LatentDataModule


@dataclass(frozen=True)
class TextDrawing:
    """How images of prompts are drawn.

    Attributes:
        size: height and width in pixels; None means as in training.
        seed: the noise of an image depends on it and on the image's number.
        sampler: name in diffusion.SAMPLERS.
        steps: of the sampler.
        guidance: of the text against the empty prompt; SANA's pipeline in diffusers has 4.5 and 20 steps.
    """

    size: tuple[int, int] | None = None
    seed: int = 0
    sampler: str = "dpm++"
    steps: int = 20
    guidance: Guidance = Guidance(4.5)  # noqa: RUF009  frozen


@dataclass(frozen=True)
class TextImageJob(PromptedJob):
    """Which images to draw.

    Attributes:
        found: the run.
        prompts: in their order.
        each: images of each prompt; image i shows prompt i // each.
        drawing: size, seed, sampler and guidance.
        batch_size: images drawn at once.
    """

    found: TextImageRun
    prompts: tuple[Prompt, ...]
    each: int
    drawing: TextDrawing
    batch_size: int

    @property
    def of(self) -> TextImageRun:
        return self.found

    @property
    def copies(self) -> int:
        return self.each

    def settings(self) -> dict[str, Any]:
        """Return everything that the images depend on, as JSON values."""
        return self.settings_of(asdict(self.drawing), {"each": self.each})


def find_text_image_run(
    run: str, runs: str | None = None, ckpt: str | None = None, ema: bool = True
) -> TextImageRun:
    """Find a run and its checkpoint, and build the task without weights.

    Args:
        run, runs, ckpt, ema: see :func:`open_run`.

    Raises:
        UserError: no such run or checkpoint, or no text-to-image model.
    """
    needed = "drawing images of prompts needs a text-to-image model"
    opened = open_run(run, TextToImageTask, needed, runs, ckpt, ema)
    return TextImageRun(opened.folder, opened.weights, opened.task, cast(Any, opened.data))


def sample_shape(found: TextImageRun, size: tuple[int, int] | None) -> tuple[int, ...]:
    """Return the shape (C, height, width) of the samples of images.

    Args:
        found: the run.
        size: height and width in pixels; None means as in training.

    Raises:
        UserError: a size that the autoencoder, the patches or the blocks of a layer cannot take.
    """
    if size is None:
        return tuple(found.task.sample_shape)
    height, width = size
    try:
        latent = found.data.sample_size(height, width)
        found.task.check_size(latent)
    except UserError as error:
        raise UserError("size", f"run {found.run.run_id} cannot draw {height}x{width} ({error})") from error
    return (found.task.sample_shape[0], *latent)


def draw_text_images(
    job: TextImageJob,
    folder: Path,
    processes: int,
    device: torch.device,
    on_batch: Callable[[int], Any],
    on_prompt: Callable[[], Any] = lambda: None,
) -> np.ndarray:
    """Draw the images that `folder` lacks: NUMBER-PROMPT.png and samples.json.

    Args:
        job: the images.
        folder: made where it does not exist.
        processes: number of processes; they share the cores, and the GPUs if there are several.
        device: where the images are drawn.
        on_batch: called with the number of images that an earlier attempt has left, then with the number of
            each finished batch.
        on_prompt: called after each encoded prompt.

    Returns:
        uint8 (images, H, W, 3)

    Raises:
        UserError: settings that cannot be drawn, a prompt that is too long, or a folder with other images.
    """
    found, drawing = job.found, job.drawing
    check_sampler(drawing.sampler, found.task.process, drawing.steps)
    check_guided_channels(found.run, drawing.guidance, found.task.sample_shape[0])
    shape = sample_shape(found, drawing.size)
    make = partial(_open, shape, drawing)
    work = draw_prompted(job, folder, "images", make, processes, device, on_batch, on_prompt)
    images = np.concatenate([drawn_part(part_file(folder, batch)) for batch in work])
    _finish(job, folder, images)
    return images


def _open(shape: tuple[int, ...], drawing: TextDrawing, job: JobPlace, device: torch.device) -> Draw:
    found = find_text_image_run(job.run, ckpt=job.checkpoint, ema=job.averaged)
    task = load_backbone(found.task, found.weights, device)
    features = job.features(found.data.text_encoder)

    def draw(images: range) -> None:
        keys: list[Key] = [(drawing.seed, "sample", image) for image in images]
        # On a GPU the model computes in bfloat16, as SANA's released weights.
        with torch.autocast(task.device.type, torch.bfloat16, enabled=task.device.type == "cuda"):
            drawn = draw_samples(task, features.of(images), features.null, shape, keys, drawing)
        write_npy(part_file(job.folder, images), found.data.to_images(drawn).cpu().numpy())

    return draw


def _finish(job: TextImageJob, folder: Path, images: np.ndarray) -> None:
    rows = []
    for number, (image, text) in enumerate(zip(images, job.texts, strict=True)):
        name = Path(file_name(number, text)).with_suffix(".png").name
        with replacing(folder / name) as temporary:
            Image.fromarray(image).save(temporary, format="PNG")
        rows.append({"file": name, "prompt": text, "image": number % job.each, "number": number})
    facts = {"seed": job.drawing.seed, "height": images.shape[1], "width": images.shape[2]}
    write_json(folder / LIST, {"format": FORMAT, **facts, "images": rows})
