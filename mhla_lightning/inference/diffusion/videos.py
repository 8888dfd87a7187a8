"""Videos from a diffusion run: video i of a seed is the same in any batch and on any number of processes."""

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
from mhla_lightning.errors import UserError
from mhla_lightning.inference.diffusion.drawing import Key, draw_samples
from mhla_lightning.inference.rebuilding import load_backbone, rebuild
from mhla_lightning.inference.weights import FoundRun, find_weights, memory_bytes
from mhla_lightning.runs.folder import find_run, runs_root
from mhla_lightning.tasks.video_diffusion import VideoDiffusionTask

if TYPE_CHECKING:
    from mhla_lightning.data.modules.clips import ClipDataModule
    from mhla_lightning.data.modules.latents import LatentDataModule

_STRIDES = tuple(
    product((1, 2, 4, 8), (1, 2, 4, 8, 16, 32))
)  # frames and pixels a side of what one place of a latent may stand for
_REACH = 128  # so far from what was asked for the nearest that works is looked for


class Size(NamedTuple):
    """Frames, and pixels of a frame."""

    frames: int
    height: int
    width: int


@dataclass(frozen=True)
class VideoRun(FoundRun):
    """A run of a video diffusion model.

    Attributes:
        task: built from recipe.yaml, without weights.
        data: what encodes prompts and makes pixels of its samples; no shards are opened.
    """

    task: VideoDiffusionTask
    data: ClipDataModule | LatentDataModule


@dataclass(frozen=True)
class VideoDrawing:
    """How videos are drawn.

    Attributes:
        size: of every video.
        seed: with the number of a video it gives its noise.
        sampler, steps: see diffusion.SAMPLERS.
        guidance: of the text against the empty prompt; the release's video sampler takes 3 (SPEC 6.6).
    """

    size: Size
    seed: int = 0
    sampler: str = "dpm++"
    steps: int = 50
    guidance: Guidance = Guidance(3.0)  # noqa: RUF009  frozen


def video_sampler(process: Process) -> str:
    """The sampler of a video where none is named: the release's DPM-Solver++ for flow matching (SPEC 6.6)."""
    return "dpm++" if process.name == "flow" else default_sampler(process)


def find_video_run(run: str, runs: str | None = None, ckpt: str | None = None, ema: bool = True) -> VideoRun:
    """Finds a run and its checkpoint, and builds the task without weights.

    Args:
        run: id or folder.
        runs: where run folders live; None is $MHLA_RUNS, else ./runs.
        ckpt: a step, or a checkpoint folder; None is the newest.
        ema: take the average where the checkpoint has one.

    Raises:
        UserError: no such run or checkpoint, no video diffusion model.
    """
    folder = find_run(run, runs_root(runs))
    built = rebuild(folder, VideoDiffusionTask, "sampling videos needs a video diffusion model")
    return VideoRun(
        folder, find_weights(folder, ckpt, ema), cast(VideoDiffusionTask, built.task), cast(Any, built.data)
    )


def load_video_task(found: VideoRun, device: torch.device | str) -> VideoDiffusionTask:
    """The task with its weights, in eval mode, on `device`. Raises UserError for weights of another model."""
    return load_backbone(found.task, found.weights, device)


def training_size(found: VideoRun) -> Size:
    """Frames, height and width of the task's sample_shape, through the data's VAE where there is one.

    Raises:
        UserError: the data give no such sample.
    """
    _, frames, height, width = found.task.sample_shape
    from mhla_lightning.data.modules.latents import LatentDataModule

    if isinstance(found.data, LatentDataModule):
        found.data.open_video_vae()  # one that cannot be opened is told as such
    for time, space in _STRIDES:
        size = Size(time * (frames - 1) + 1, space * height, space * width)
        if _shape(found, size) == tuple(found.task.sample_shape):
            return size
    raise UserError(
        f"the samples of run {found.run.run_id} are {tuple(found.task.sample_shape)}, which its data "
        "do not give; say --frames and --size"
    )


def _shape(found: VideoRun, size: Size) -> tuple[int, ...] | None:
    """(C, T, H, W) of a sample of this size; None where the data cannot give it."""
    try:
        return tuple(found.data.sample_shape(*size))
    except UserError:
        return None


def check_video(found: VideoRun, drawing: VideoDrawing, videos: int, device: torch.device) -> None:
    """Whether so many videos at once can be drawn on `device`.

    Raises:
        UserError: an unknown sampler, guided channels that are not there, frames, height and width that the
            VAE, the patch or a layer's blocks cannot take, with the nearest that they can, or that fit into
            no memory of this size.
    """
    check_sampler(drawing.sampler, found.task.process, drawing.steps)
    channels = found.task.sample_shape[0]
    if (drawing.guidance.channels or 0) > channels:
        raise UserError(
            f"guidance of {drawing.guidance.channels} channels, and the samples of run "
            f"{found.run.run_id} have {channels}"
        )
    with torch.device("meta"):
        task = found.task
        plan: Any = build_backbone(task.backbone_name, attention=task.attention, **task.backbone_options)

    def grid(size: Size) -> tuple[int, ...]:
        if min(size) < 1:
            raise UserError("frames, height and width must be at least 1")
        return plan.check_size(found.data.sample_shape(*size)[1:])

    try:
        tokens = math.prod(grid(drawing.size))
    except UserError as error:
        frames, height, width = drawing.size
        near = _nearest(found, drawing.size, grid)
        hint = (
            ""
            if near is None
            else f"; the nearest it can is --frames {near.frames} --size {near.height}x{near.width}"
        )
        raise UserError(
            f"run {found.run.run_id} cannot draw {frames} frames of {height}x{width} ({error}){hint}"
        ) from error
    least, room = videos * _least_bytes(drawing.size, tokens, plan.embed_dim), memory_bytes(device)
    if least > room:
        frames, height, width = drawing.size
        what = f"{frames} frames of {height}x{width}" + (f", {videos} at once" if videos > 1 else "")
        has = f"{device} has {decimal(room)} of memory"
        raise UserError(
            f"run {found.run.run_id} cannot draw {what}: they take at least {decimal(least)}, and "
            f"{has}; ask for fewer or smaller frames"
        )


def _least_bytes(size: Size, tokens: int, channels: int) -> int:
    """Of a video, however it is drawn: the residual stream in float32 beside q, k and v in bf16, or the
    frames in float32 and as bytes.
    """
    return max((4 + 3 * 2) * tokens * channels, (4 + 1) * 3 * math.prod(size))


def _nearest(found: VideoRun, size: Size, fit: Callable[[Size], Any]) -> Size | None:
    """Axis by axis: what works beside the sizes of training works, since no axis asks anything of another."""

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
    """uint8 (len(videos), F, H, W, 3): the videos of these numbers. task: loaded; on a GPU it computes in
    bfloat16 (SPEC 6.6).

    Args:
        text: (len(videos), tokens, channels). null: (tokens, channels).
    """
    shape = tuple(found.data.sample_shape(*drawing.size))
    keys: list[Key] = [(drawing.seed, "sample", video) for video in videos]
    with torch.autocast(task.device.type, torch.bfloat16, enabled=task.device.type == "cuda"):
        drawn = draw_samples(task, text, null, shape, keys, drawing)
    return found.data.to_videos(drawn).cpu().numpy()
