"""Many videos into a folder: by several processes, and from where it stopped when it was killed."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mhla_lightning.errors import UserError
from mhla_lightning.inference.diffusion.parts import Draw, batches, claim, draw_parts, part_file, write_npy
from mhla_lightning.inference.diffusion.prompts import Prompt, TextCache
from mhla_lightning.inference.diffusion.video_files import (
    contact_sheet,
    file_name,
    require_av,
    thumbnails,
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

SHEET, LIST, TEXT = "sheet.png", "samples.json", "text"
_EMPTY = Prompt("", "the empty prompt")
_SHEET_ROWS = 64  # videos on the contact sheet at most


@dataclass(frozen=True)
class VideoJob:
    """What to draw.

    Attributes:
        found: the run.
        prompts: in their order.
        clips: videos of each prompt; video i is of prompt i // clips.
        drawing: how.
        batch_size: videos at once.
        rate: frames a second of the files; see :func:`frame_rate`.
    """

    found: VideoRun
    prompts: tuple[Prompt, ...]
    clips: int
    drawing: VideoDrawing
    batch_size: int
    rate: float

    @property
    def texts(self) -> tuple[str, ...]:
        """The prompt of every video."""
        return tuple(prompt.text for prompt in self.prompts for _ in range(self.clips))

    def settings(self) -> dict[str, Any]:
        """All that the videos depend on, as JSON gives it back."""
        encoder = self.found.data.text_encoder
        drawing = {
            **asdict(self.drawing),
            "size": tuple(self.drawing.size),
            "text_encoder": None if encoder is None else asdict(encoder),
        }
        prompts = [prompt.text for prompt in self.prompts]
        given = {
            **self.found.identity(),
            **drawing,
            "batch_size": self.batch_size,
            "rate": self.rate,
            "clips": self.clips,
            "prompts": prompts,
        }
        return json.loads(json.dumps(given))


def frame_rate(found: VideoRun, rate: float | None) -> float:
    """What was asked for, else that of the run's data.

    Raises:
        UserError: the data are not there.
    """
    if rate is not None:
        return rate
    try:
        return float(found.data.frame_rate)
    except UserError as error:
        raise UserError(
            f"the data of run {found.run.run_id} do not tell the frame rate ({error}); say it with --rate"
        ) from error


def draw_videos(
    job: VideoJob,
    folder: Path,
    processes: int,
    device: torch.device,
    on_batch: Callable[[int], Any],
    on_prompt: Callable[[], Any] = lambda: None,
) -> list[Path]:
    """Draws what `folder` does not hold yet: NUMBER-PROMPT.mp4 each, sheet.png (a row a video, frames over
    time) and samples.json.

    Args:
        processes: they share the cores; on several GPUs each takes its own in turn.
        on_batch: called with how many videos an earlier attempt has left, then with those of every batch that
            is done.
        on_prompt: called after every prompt that is encoded.

    Returns:
        the files, in the order of the videos.

    Raises:
        UserError: what cannot be drawn, a prompt that is too long, PyAV missing, or a folder that holds other
            videos.
    """
    require_av()
    check_video(job.found, job.drawing, min(job.batch_size, len(job.texts)), device)
    if job.found.data.text_encoder is None:
        raise UserError(
            f"the recipe of run {job.found.run.run_id} has no data.text_encoder, which its prompts "
            "would be encoded by"
        )
    cache = TextCache(folder / TEXT, job.found.data.text_encoder)
    features = cache.encode([*job.prompts, _EMPTY], device, on_prompt)
    claim(folder, job.settings(), "videos")
    cache.keep(features)
    files = [folder / file_name(number, text) for number, text in enumerate(job.texts)]
    work = batches(len(files), job.batch_size)
    missing = [
        videos
        for videos in work
        if not all(file.is_file() for file in (part_file(folder, videos), *(files[n] for n in videos)))
    ]
    on_batch(len(files) - sum(map(len, missing)))
    run = (str(job.found.run.path), str(job.found.checkpoint), job.found.averaged)
    draw_parts(
        partial(_open, run, job.texts, job.drawing, job.rate, folder), missing, processes, device, on_batch
    )
    _finish(job, folder, files, work)
    return files


def _open(
    run: tuple[str, str, bool],
    texts: Sequence[str],
    drawing: VideoDrawing,
    rate: float,
    folder: Path,
    device: torch.device,
) -> Draw:
    found = find_video_run(run[0], ckpt=run[1], ema=run[2])
    assert found.data.text_encoder is not None
    task, cache = load_video_task(found, device), TextCache(folder / TEXT, found.data.text_encoder)
    null = cache.read([_EMPTY.text])[0]

    def draw(videos: range) -> None:
        drawn = draw_videos_of(
            found, task, cache.read([texts[video] for video in videos]), null, videos, drawing
        )
        for video, frames in zip(videos, drawn, strict=True):
            write_mp4(folder / file_name(video, texts[video]), frames, rate)
        write_npy(
            part_file(folder, videos), np.stack([thumbnails(frames) for frames in drawn])
        )  # last: it says that the batch is done

    return draw


def _finish(job: VideoJob, folder: Path, files: Sequence[Path], work: Sequence[range]) -> None:
    rows: list[np.ndarray] = []
    for videos in work:
        if len(rows) < _SHEET_ROWS:
            rows += list(np.load(part_file(folder, videos), allow_pickle=False))
    shown = rows[:_SHEET_ROWS]
    contact_sheet(shown, [text or "(empty prompt)" for text in job.texts[: len(shown)]]).save(folder / SHEET)
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
