"""Draw videos from a diffusion run; the seed and the number of a video determine it.

It is the same video in any batch and with any number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from rich.filesize import decimal
from torch import Tensor

from mhla_lightning.backbones import build_backbone
from mhla_lightning.diffusion import Guidance, Process, check_sampler, default_sampler
from mhla_lightning.diffusion.drawing import Key, draw_samples
from mhla_lightning.errors import UserError
from mhla_lightning.inference.diffusion.drawing import check_guided_channels
from mhla_lightning.inference.rebuilding import load_backbone, open_run
from mhla_lightning.inference.weights import FoundRun, memory_bytes
from mhla_lightning.tasks.video_diffusion import VideoDiffusionTask

if TYPE_CHECKING:
    from mhla_lightning.data.modules.clips import ClipDataModule
    from mhla_lightning.data.modules.latents import LatentDataModule

# Frames, and pixels per side, that one position of a latent may cover.
_STRIDES = tuple(product((1, 2, 4, 8), (1, 2, 4, 8, 16, 32)))
_REACH = 128  # how far from the requested frames or pixels the search for a working size goes


class Size(NamedTuple):
    """Frames of a video, and pixels of a frame."""

    frames: int
    height: int
    width: int


@dataclass(frozen=True)
class VideoRun(FoundRun):
    """A run of a video diffusion model.

    Attributes:
        task: built from recipe.yaml, without weights.
        data: encodes prompts and turns samples into pixels; no shards are opened.
    """

    task: VideoDiffusionTask
    data: ClipDataModule | LatentDataModule


@dataclass(frozen=True)
class VideoDrawing:
    """How videos are drawn.

    Attributes:
        size: of every video.
        seed: the noise of a video depends on it and on the video's number.
        sampler: name in diffusion.SAMPLERS.
        steps: of the sampler.
        guidance: of the text against the empty prompt; the MHLA release uses scale 3 (SPEC 6.6).
    """

    size: Size
    seed: int = 0
    sampler: str = "dpm++"
    steps: int = 50
    guidance: Guidance = Guidance(3.0)  # noqa: RUF009  frozen


def video_sampler(process: Process) -> str:
    """Return the default sampler of videos.

    For flow matching it is DPM-Solver++, as in the release (SPEC 6.6).
    """
    return "dpm++" if process.name == "flow" else default_sampler(process)


def find_video_run(run: str, runs: str | None = None, ckpt: str | None = None, ema: bool = True) -> VideoRun:
    """Find a run and its checkpoint, and build the task without weights.

    Args:
        run, runs, ckpt, ema: see :func:`open_run`.

    Raises:
        UserError: no such run or checkpoint, or no video diffusion model.
    """
    needed = "sampling videos needs a video diffusion model"
    opened = open_run(run, VideoDiffusionTask, needed, runs, ckpt, ema)
    return VideoRun(opened.folder, opened.weights, opened.task, cast(Any, opened.data))


def load_video_task(found: VideoRun, device: torch.device | str) -> VideoDiffusionTask:
    """Load the task's weights and return it in eval mode on `device`.

    Raises:
        UserError: the weights belong to another model.
    """
    return load_backbone(found.task, found.weights, device)


def training_size(found: VideoRun) -> Size:
    """Return the frames, height and width of a video whose sample has the task's shape.

    A VAE of the data is taken into account.

    Raises:
        UserError: no size of video gives this shape.
    """
    _, frames, height, width = found.task.sample_shape
    from mhla_lightning.data.modules.latents import LatentDataModule

    if isinstance(found.data, LatentDataModule):
        found.data.open_video_vae()  # a VAE that cannot be opened raises its own error here
    for time, space in _STRIDES:
        size = Size(time * (frames - 1) + 1, space * height, space * width)
        if _shape(found, size) == tuple(found.task.sample_shape):
            return size
    raise UserError(
        "size",
        f"the data of run {found.run.run_id} give no samples of shape {tuple(found.task.sample_shape)}; "
        "give `frames` and `size`",
    )


def _shape(found: VideoRun, size: Size) -> tuple[int, ...] | None:
    """Return the sample shape (C, T, H, W) of a video size; None where the data cannot give it."""
    try:
        return tuple(found.data.sample_shape(*size))
    except UserError:
        return None


def check_video(found: VideoRun, drawing: VideoDrawing, videos: int, device: torch.device) -> None:
    """Check that `videos` videos can be drawn at once on `device`.

    Raises:
        UserError: an unknown sampler, or more guided channels than the samples have; a size that the VAE, the
            patches or the blocks of a layer cannot take, with the nearest that works; videos that need more
            memory than the device has.
    """
    check_sampler(drawing.sampler, found.task.process, drawing.steps)
    check_guided_channels(found.run, drawing.guidance, found.task.sample_shape[0])
    with torch.device("meta"):
        task = found.task
        plan: Any = build_backbone(task.backbone_name, attention=task.attention, **task.backbone_options)

    def grid(size: Size) -> tuple[int, ...]:
        if min(size) < 1:
            raise UserError("size", "frames, height and width must be at least 1")
        return plan.check_size(found.data.sample_shape(*size)[1:])

    try:
        tokens = math.prod(grid(drawing.size))
    except UserError as error:
        frames, height, width = drawing.size
        near = _nearest(found, drawing.size, grid)
        hint = (
            ""
            if near is None
            else f"; the nearest that works is `frames` {near.frames} `size` {near.height}x{near.width}"
        )
        raise UserError(
            "size", f"run {found.run.run_id} cannot draw {frames} frames of {height}x{width} ({error}){hint}"
        ) from error
    least, room = videos * _least_bytes(drawing.size, tokens, plan.embed_dim), memory_bytes(device)
    if least > room:
        frames, height, width = drawing.size
        what = f"{frames} frames of {height}x{width}" + (f", {videos} at once" if videos > 1 else "")
        has = f"{device} has {decimal(room)} of memory"
        raise UserError(
            "size",
            f"run {found.run.run_id} cannot draw {what}: they take at least {decimal(least)}, and {has}; "
            "choose fewer or smaller frames",
        )


def _least_bytes(size: Size, tokens: int, channels: int) -> int:
    """Return the bytes that one video needs with any method.

    Either the model needs more, with the residual stream in float32 and q, k and v in bf16. Or the frames
    do, in float32 and as bytes.
    """
    return max((4 + 3 * 2) * tokens * channels, (4 + 1) * 3 * math.prod(size))


def _nearest(found: VideoRun, size: Size, fit: Callable[[Size], Any]) -> Size | None:
    """Search the nearest size that works, one axis at a time.

    The axes are independent: a value that works with the training size on the other axes always works.
    """

    def works(candidate: Size) -> bool:
        try:
            fit(candidate)
        except UserError:
            return False
        return True

    try:
        base = training_size(found)
    except UserError:
        return None
    near = list(base)
    for axis, wanted in enumerate(size):
        around = (value for step in range(_REACH) for value in (wanted - step, wanted + step))
        fitting = (
            value
            for value in around
            if works(Size(*(value if n == axis else side for n, side in enumerate(base))))
        )
        near[axis] = next(fitting, base[axis])
    return Size(*near) if works(Size(*near)) else None


def draw_videos_of(
    found: VideoRun,
    task: VideoDiffusionTask,
    text: Tensor,
    null: Tensor,
    videos: range,
    drawing: VideoDrawing,
) -> np.ndarray:
    """Draw the videos of these numbers: uint8 (len(videos), F, H, W, 3).

    On a GPU the model computes in bfloat16 (SPEC 6.6).

    Args:
        found: the run.
        task: its task with weights.
        text: text features, (len(videos), tokens, channels).
        null: features of the empty prompt, (tokens, channels).
        videos: numbers of the videos.
        drawing: size, seed, sampler and guidance.
    """
    shape = tuple(found.data.sample_shape(*drawing.size))
    keys: list[Key] = [(drawing.seed, "sample", video) for video in videos]
    with torch.autocast(task.device.type, torch.bfloat16, enabled=task.device.type == "cuda"):
        drawn = draw_samples(task, text, null, shape, keys, drawing)
    return found.data.to_videos(drawn).cpu().numpy()
