"""Draw many videos into a folder with several processes; a stopped job continues."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mhla_lightning.errors import UserError
from mhla_lightning.inference.diffusion.parts import Draw, drawn_part, part_file, write_npy
from mhla_lightning.inference.diffusion.prompted import JobPlace, PromptedJob, draw_prompted
from mhla_lightning.inference.diffusion.prompts import Prompt
from mhla_lightning.inference.diffusion.video_files import (
    file_name,
    require_av,
    thumbnails,
    video_sheet,
    write_mp4,
)
from mhla_lightning.inference.diffusion.videos import (
    VideoDrawing,
    VideoRun,
    check_video,
    draw_videos_of,
    find_video_run,
    load_video_task,
)
from mhla_lightning.runs.folder import FORMAT, write_json

SHEET, LIST = "sheet.png", "samples.json"
_SHEET_ROWS = 64  # videos on the contact sheet at most


@dataclass(frozen=True)
class VideoJob(PromptedJob):
    """Which videos to draw.

    Attributes:
        found: the run.
        prompts: in their order.
        clips: videos of each prompt; video i shows prompt i // clips.
        drawing: size, seed, sampler and guidance.
        batch_size: videos drawn at once.
        rate: frames per second of the files; see :func:`frame_rate`.
    """

    found: VideoRun
    prompts: tuple[Prompt, ...]
    clips: int
    drawing: VideoDrawing
    batch_size: int
    rate: float

    @property
    def of(self) -> VideoRun:
        return self.found

    @property
    def copies(self) -> int:
        return self.clips

    def settings(self) -> dict[str, Any]:
        """Return everything that the videos depend on, as JSON values."""
        drawing = {**asdict(self.drawing), "size": tuple(self.drawing.size)}
        return self.settings_of(drawing, {"rate": self.rate, "clips": self.clips})


def frame_rate(found: VideoRun, rate: float | None) -> float:
    """Return the given frame rate, or that of the run's data.

    Args:
        found: the run.
        rate: frames per second; None means the rate of the data.

    Raises:
        UserError: None was given and the data are not there.
    """
    if rate is not None:
        return rate
    try:
        return float(found.data.frame_rate)
    except UserError as error:
        raise UserError(
            "rate", f"the data of run {found.run.run_id} do not give a frame rate ({error}); give one"
        ) from error


def draw_videos(
    job: VideoJob,
    folder: Path,
    processes: int,
    device: torch.device,
    on_batch: Callable[[int], Any],
    on_prompt: Callable[[], Any] = lambda: None,
) -> list[Path]:
    """Draw the videos that `folder` lacks: NUMBER-PROMPT.mp4, sheet.png and samples.json.

    sheet.png has a row per video, with its frames in their order.

    Args:
        job: the videos.
        folder: made where it does not exist.
        processes: number of processes; they share the cores, and the GPUs if there are several.
        device: where the videos are drawn.
        on_batch: called with the number of videos that an earlier attempt has left, then with the number of
            each finished batch.
        on_prompt: called after each encoded prompt.

    Returns:
        the files, in the order of the videos.

    Raises:
        UserError: settings that cannot be drawn, a prompt that is too long, PyAV missing, or a folder with
            other videos.
    """
    require_av()
    check_video(job.found, job.drawing, min(job.batch_size, len(job.texts)), device)
    make = partial(_open, job.drawing, job.rate)
    work = draw_prompted(job, folder, "videos", make, processes, device, on_batch, on_prompt)
    files = _files(folder, range(len(job.texts)), job.texts)
    _finish(job, folder, files, work)
    return files


def _files(folder: Path, videos: range, texts: Sequence[str]) -> list[Path]:
    return [folder / file_name(video, texts[video]) for video in videos]


def _open(drawing: VideoDrawing, rate: float, job: JobPlace, device: torch.device) -> Draw:
    found = find_video_run(job.run, ckpt=job.checkpoint, ema=job.averaged)
    task, features = load_video_task(found, device), job.features(found.data.text_encoder)

    def draw(videos: range) -> None:
        drawn = draw_videos_of(found, task, features.of(videos), features.null, videos, drawing)
        files = _files(job.folder, videos, job.texts)
        for file, frames in zip(files, drawn, strict=True):
            write_mp4(file, frames, rate)
        # Written last, because this file marks the batch as done.
        write_npy(part_file(job.folder, videos), np.stack([thumbnails(frames) for frames in drawn]), files)

    return draw


def _finish(job: VideoJob, folder: Path, files: Sequence[Path], work: Sequence[range]) -> None:
    rows: list[np.ndarray] = []
    for videos in work:
        if len(rows) < _SHEET_ROWS:
            rows += list(drawn_part(part_file(folder, videos)))
    shown = rows[:_SHEET_ROWS]
    video_sheet(shown, [text or "(empty prompt)" for text in job.texts[: len(shown)]]).save(folder / SHEET)
    videos_made = [
        {
            "file": file.name,
            "prompt": text,
            "clip": number % job.clips,
            "seed": job.drawing.seed,
            "number": number,
        }
        for number, (file, text) in enumerate(zip(files, job.texts, strict=True))
    ]
    facts = {"frame_rate": job.rate, **job.drawing.size._asdict()}
    write_json(folder / LIST, {"format": FORMAT, **facts, "videos": videos_made})
