"""Draws images or videos from a diffusion run.

Images: samples.npz (in ADM's layout) and a grid; of prompts PNG files and a grid. Videos: mp4 files and a
contact sheet.
  mhla sample RUN --classes 0-9 --n 100 --guidance 1.5 --sampler ddpm --steps 250 --seed 0
  mhla sample RUN --classes 0-9 --n 20 --size 64x64
  mhla sample RUN --prompts prompts.txt --size 1024x1024 --n 4
  mhla sample RUN --prompts prompts.txt --frames 81 --size 480x800 --steps 50 --guidance 3.0
The same command continues a stopped job. The seed and the number of an image or video determine it.
Any batch size and number of processes give the same pixels to 1/255; one batch size gives the same bits.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mhla_lightning.cli.numbers import demand_at_most, parse_ranges
from mhla_lightning.cli.output import check_json, write_json
from mhla_lightning.cli.trained import add_trained_arguments
from mhla_lightning.errors import UserError, inside
from mhla_lightning.runs.folder import shortened

_SIZE = re.compile(r"([0-9]{1,6})x([0-9]{1,6})")
_MOST_CLASSES = 100_000
_MOST = {"n": 10_000_000, "batch_size": 1_000_000, "processes": 1024, "frames": 100_000}
_GRID = 100  # images of the grid at most
_FASTEST = 240  # frames per second
_DEFAULTS = {
    "images": {"n": 100, "guidance": 1.5, "steps": 250, "batch_size": 50},
    "images of prompts": {"n": 1, "guidance": 4.5, "steps": 20, "batch_size": 4},
    "videos": {"n": 1, "guidance": 3.0, "steps": 50, "batch_size": 1},
}
_TAKES = {
    "classes": ("images",),
    "guidance_channels": ("images", "images of prompts"),
    "prompts": ("images of prompts", "videos"),
    "prompt": ("images of prompts", "videos"),
    "frames": ("videos",),
    "rate": ("videos",),
}
"""Option -> kinds of runs that take it; the others are for all."""


# Arguments of the library functions that are called here, and the options that give them.
_OPTIONS = {
    "labels": "classes",
    "guidance.scale": "guidance",
    "guidance.channels": "guidance_channels",
    "guidance.interval": "guidance_interval",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mhla sample`."""
    add_trained_arguments(parser)
    parser.add_argument(
        "--n",
        type=int,
        help="images over all classes (default: 100), or images or videos of each prompt (default: 1)",
    )
    parser.add_argument(
        "--guidance",
        type=float,
        help="scale of classifier-free guidance; 1 means none (default: 1.5, for images of prompts 4.5, "
        "for videos 3)",
    )
    parser.add_argument(
        "--guidance-interval",
        type=float,
        nargs=2,
        default=(0.0, 1.0),
        metavar=("LOW", "HIGH"),
        help="part of the time axis that is guided",
    )
    parser.add_argument(
        "--sampler",
        help=(
            "ddpm, ddim or dpm++ (default: ddpm); for flow matching euler or dpm++ (default: euler for "
            "classes, dpm++ for prompts)"
        ),
    )
    parser.add_argument(
        "--steps", type=int, help="of the sampler (default: 250, for images of prompts 20, for videos 50)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    parser.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="images drawn at once (default: 50, of prompts 4), or videos (default: 1)",
    )
    parser.add_argument(
        "--size",
        metavar="HxW",
        help="height and width in pixels, e.g. 480x800 (default: as in training)",
    )
    parser.add_argument(
        "--processes", type=int, default=1, metavar="N", help="processes that draw (default: %(default)s)"
    )
    parser.add_argument(
        "--out", metavar="DIR", help="folder to write (default: images/NAME or videos/NAME in the run folder)"
    )
    parser.add_argument("--json", metavar="FILE", help="write settings, counts and seconds as JSON")
    images = parser.add_argument_group("images")
    images.add_argument("--classes", metavar="0-9,12", help="classes, used in turn (default: all)")
    images.add_argument(
        "--guidance-channels",
        type=int,
        metavar="C",
        help="guide the first C channels only; 3 as in the original DiT (default: all)",
    )
    add_video_arguments(parser.add_argument_group("videos, and images of prompts"))


def add_video_arguments(parser: Any) -> None:
    """Add the arguments of prompts and of videos."""
    parser.add_argument(
        "--prompts", metavar="FILE", help='one prompt per line, or .jsonl with {"prompt": ...} in every line'
    )
    parser.add_argument(
        "--prompt", metavar="TEXT", action="append", help="one prompt; may be given several times"
    )
    parser.add_argument("--frames", type=int, metavar="F", help="of each video (default: as in training)")
    parser.add_argument(
        "--rate",
        type=float,
        metavar="R",
        help="frames per second of the files (default: as in the run's data)",
    )


def run(args: argparse.Namespace) -> int:
    """Run the verb and return the exit code."""
    _finish(args, perform(args))
    return 0


@dataclass(frozen=True)
class DrawnFiles:
    """Images or videos that were drawn.

    Args:
        found: the run.
        kind: of the files.
        count: of images or videos.
        folder: that holds them.
        places: what to show -> file.
        settings: that determine the pixels.
        seconds: that drawing took.
    """

    found: Any
    kind: Literal["images", "videos"]
    count: int
    folder: Path
    places: dict[str, Path]
    settings: dict[str, Any]
    seconds: float


def perform(args: argparse.Namespace) -> DrawnFiles:
    """Draw what the arguments ask for.

    Raises:
        UserError: an argument or the run is wrong.
    """
    check_common(args)
    check_json(args.json)
    classes = None if args.classes is None else parse_classes(args.classes)
    from mhla_lightning.inference.rebuilding import trains
    from mhla_lightning.runs.folder import find_run, runs_root
    from mhla_lightning.tasks import TextToImageTask, VideoDiffusionTask

    folder = find_run(args.run, runs_root(args.runs))
    kinds: dict[str, type[Any]] = {"videos": VideoDiffusionTask, "images of prompts": TextToImageTask}
    kind = next((name for name, task in kinds.items() if trains(folder, task)), "images")
    for name, takers in _TAKES.items():
        if getattr(args, name) is not None and kind not in takers:
            raise UserError(
                name,
                f"only for runs that draw {' or '.join(takers)}; run {folder.run_id} draws {kind}; "
                "leave it out",
            )
    for name, value in _DEFAULTS[kind].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    with _options_for_arguments():
        if kind == "images":
            return _images(args, classes)
        prompts = given_prompts(args.prompts, args.prompt)
        if not prompts:
            raise UserError("prompts", "no prompt was given; name a file here, or write one with `prompt`")
        return _draw_videos(args, prompts) if kind == "videos" else _draw_text_images(args, prompts)


def _finish(args: argparse.Namespace, drawn: DrawnFiles) -> None:
    """Print a summary, and write it as JSON."""
    _print_summary(drawn.found, f"{drawn.count} {drawn.kind}", drawn.seconds, drawn.places)
    facts = {"folder": str(drawn.folder), drawn.kind: drawn.count, "seconds": drawn.seconds}
    write_json(args.json, {**drawn.settings, **facts})


@contextmanager
def _options_for_arguments() -> Iterator[None]:
    """Name the option of this verb in errors about an argument of the library."""
    try:
        yield
    except UserError as error:
        error.key = _OPTIONS.get(error.key or "", error.key)
        raise


def check_common(args: argparse.Namespace) -> None:
    """Check counts, the frame rate and the seed.

    Raises:
        UserError: one is outside its range.
    """
    for name in ("n", "batch_size", "processes", "steps", "frames"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(name, f"{value} is too small; it must be at least 1")
    demand_at_most(args, **_MOST)
    if args.rate is not None and not 0 < args.rate <= _FASTEST:
        raise UserError("rate", f"{args.rate:g} is not above 0 and at most {_FASTEST}")
    if not 0 <= args.seed < 2**32:
        raise UserError("seed", f"{args.seed} is not between 0 and 4294967295")


def _images(args: argparse.Namespace, classes: list[int] | None) -> DrawnFiles:
    from mhla_lightning.diffusion import Guidance, default_sampler
    from mhla_lightning.inference.diffusion.image_job import ImageJob, draw_images
    from mhla_lightning.inference.diffusion.images import Drawing, find_image_run
    from mhla_lightning.inference.diffusion.parts import job_name
    from mhla_lightning.inference.weights import choose_device

    device = choose_device(args.device)
    size = None if args.size is None else parse_size(args.size)
    found = find_image_run(args.run, args.runs, args.ckpt, ema=not args.no_ema, size=size)
    classes = classes or list(range(found.task.num_classes))
    labels = tuple(classes[number % len(classes)] for number in range(args.n))
    sampler = args.sampler or default_sampler(found.task.process)
    with inside("guidance"):
        guidance = Guidance(args.guidance, args.guidance_channels, tuple(args.guidance_interval))
    job = ImageJob(found, labels, Drawing(args.seed, sampler, args.steps, guidance), args.batch_size)
    folder = (
        Path(args.out) if args.out else found.run.path / "images" / job_name(found.checkpoint, job.settings())
    )
    started = time.perf_counter()
    with drawing_bar(len(labels)) as on_batch:
        images = draw_images(job, folder, args.processes, device, on_batch)
    seconds = time.perf_counter() - started
    columns = min(len(classes), 10) if len(classes) > 1 else 10
    write_grid(images[:_GRID], columns, folder / "grid.png")
    places = {"images": folder / "samples.npz", "grid": folder / "grid.png"}
    return DrawnFiles(found, "images", len(images), folder, places, job.settings(), seconds)


def _draw_text_images(args: argparse.Namespace, prompts: list[Any]) -> DrawnFiles:
    from mhla_lightning.diffusion import Guidance
    from mhla_lightning.inference.diffusion.parts import job_name
    from mhla_lightning.inference.diffusion.text_images import (
        LIST,
        TextDrawing,
        TextImageJob,
        draw_text_images,
        find_text_image_run,
    )
    from mhla_lightning.inference.diffusion.videos import video_sampler
    from mhla_lightning.inference.weights import choose_device

    device = choose_device(args.device)
    found = find_text_image_run(args.run, args.runs, args.ckpt, ema=not args.no_ema)
    size = None if args.size is None else parse_size(args.size)
    with inside("guidance"):
        guidance = Guidance(args.guidance, args.guidance_channels, tuple(args.guidance_interval))
    sampler = args.sampler or video_sampler(found.task.process)
    drawing = TextDrawing(size, args.seed, sampler, args.steps, guidance)
    job = TextImageJob(found, tuple(prompts), args.n, drawing, args.batch_size)
    folder = (
        Path(args.out) if args.out else found.run.path / "images" / job_name(found.checkpoint, job.settings())
    )
    started = time.perf_counter()
    with drawing_bar(len(job.texts)) as on_batch:
        images = draw_text_images(job, folder, args.processes, device, on_batch)
    seconds = time.perf_counter() - started
    columns = args.n if 1 < args.n <= 10 else 10
    write_grid(images[:_GRID], columns, folder / "grid.png")
    places = {"images": folder, "grid": folder / "grid.png", "list": folder / LIST}
    return DrawnFiles(found, "images", len(images), folder, places, job.settings(), seconds)


def sample_text_images(args: argparse.Namespace, prompts: list[Any]) -> Path:
    """Draw args.n images of each prompt, print a summary and return the folder.

    Raises:
        UserError: the images cannot be drawn.
    """
    with _options_for_arguments():
        drawn = _draw_text_images(args, prompts)
    _finish(args, drawn)
    return drawn.folder


def sample_videos(args: argparse.Namespace, prompts: list[Any]) -> Path:
    """Draw args.n videos of each prompt, print a summary and return the folder.

    Raises:
        UserError: the videos cannot be drawn.
    """
    drawn = _draw_videos(args, prompts)
    _finish(args, drawn)
    return drawn.folder


def _draw_videos(args: argparse.Namespace, prompts: list[Any]) -> DrawnFiles:
    from mhla_lightning.inference.diffusion.parts import job_name
    from mhla_lightning.inference.diffusion.video_job import LIST, SHEET, VideoJob, draw_videos, frame_rate
    from mhla_lightning.inference.diffusion.videos import find_video_run
    from mhla_lightning.inference.weights import choose_device

    device = choose_device(args.device)
    found = find_video_run(args.run, args.runs, args.ckpt, ema=not args.no_ema)
    job = VideoJob(
        found,
        tuple(prompts),
        args.n,
        video_drawing(args, found),
        args.batch_size,
        frame_rate(found, args.rate),
    )
    folder = (
        Path(args.out) if args.out else found.run.path / "videos" / job_name(found.checkpoint, job.settings())
    )
    started = time.perf_counter()
    with drawing_bar(len(job.texts)) as on_batch:
        files = draw_videos(job, folder, args.processes, device, on_batch)
    seconds = time.perf_counter() - started
    places = {"videos": folder, "sheet": folder / SHEET, "list": folder / LIST}
    return DrawnFiles(found, "videos", len(files), folder, places, job.settings(), seconds)


def given_prompts(file: str | None, texts: list[str] | None) -> list[Any]:
    """Return the prompts of --prompts and --prompt.

    Raises:
        UserError: a file without prompts.
    """
    from mhla_lightning.inference.diffusion.prompts import Prompt, read_prompts

    return [*(read_prompts(file) if file else []), *(Prompt(text, "--prompt") for text in texts or [])]


def video_drawing(args: argparse.Namespace, found: Any) -> Any:
    """Return how videos of a run are drawn; frames and size default to those of training.

    Raises:
        UserError: a size or guidance outside its range, or no size of training.
    """
    from mhla_lightning.diffusion import Guidance
    from mhla_lightning.inference.diffusion.videos import Size, VideoDrawing, training_size, video_sampler

    size = None if args.size is None else parse_size(args.size)
    own = training_size(found) if size is None or args.frames is None else None
    frames = args.frames if own is None or args.frames is not None else own.frames
    height, width = size or (own.height, own.width)  # type: ignore[union-attr]  # own is set where size is not
    with inside("guidance"):
        guidance = Guidance(args.guidance, None, tuple(args.guidance_interval))
    return VideoDrawing(
        Size(frames, height, width),
        args.seed,
        args.sampler or video_sampler(found.task.process),
        args.steps,
        guidance,
    )


@contextmanager
def drawing_bar(total: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on a terminal; yields a function that takes the number of new samples."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("drawing", total=total)
        yield lambda count: progress.advance(bar, count)


def _print_summary(found: Any, what: str, seconds: float, places: dict[str, Path]) -> None:
    from rich.console import Console

    console, average = Console(), "averaged" if found.averaged else "raw"
    console.print(
        f"{what} of {found.run.run_id} {found.checkpoint.name} ({average} weights) in {seconds:.1f} s",
        soft_wrap=True,
    )
    for name, place in places.items():
        console.print(f"{name + ':':8}{place}", soft_wrap=True, highlight=False)


def parse_classes(text: str) -> list[int]:
    """Parse `0-9,12` to [0, ..., 9, 12].

    Raises:
        UserError: neither classes nor ranges.
    """
    return parse_ranges("classes", text, "classes", _MOST_CLASSES)


def parse_size(text: str) -> tuple[int, int]:
    """Parse `480x800` to (480, 800).

    Raises:
        UserError: another form.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or not int(match[1]) or not int(match[2]):
        raise UserError(
            "size", f"{shortened(text)} is no size; write height and width in pixels, e.g. 480x800"
        )
    return int(match[1]), int(match[2])


def write_grid(images: object, columns: int, path: Path) -> None:
    """Write images, uint8 (N, H, W, 3), as one PNG with `columns` columns."""
    import torch
    from PIL import Image
    from torchvision.utils import make_grid

    tiles = torch.as_tensor(images).permute(0, 3, 1, 2)
    Image.fromarray(make_grid(tiles, nrow=columns, padding=1).permute(1, 2, 0).numpy()).save(path)
