"""Draws images from an image diffusion run: samples.npz (ADM's layout) and a grid; or videos from a video
diffusion run: mp4 and a contact sheet.

  mhla sample RUN --classes 0-9 --n 100 --guidance 1.5 --sampler ddpm --steps 250 --seed 0
  mhla sample RUN --prompts prompts.txt --frames 81 --size 480x800 --steps 50 --guidance 3.0
The same command again goes on where it was stopped. Image (or video) i of a seed is the same for any batch
size and number of processes, to 1/255 a pixel; to the bit for the same batch size.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mhla_lightning.cli.output import check_json, write_json
from mhla_lightning.cli.trained import add_trained_arguments
from mhla_lightning.errors import UserError

_RANGE = re.compile(r"(\d+)(?:-(\d+))?")
_SIZE = re.compile(r"(\d+)x(\d+)")
_GRID = 100  # images at most
_FASTEST = 240  # frames a second
_DEFAULTS = {
    "images": {"n": 100, "guidance": 1.5, "steps": 250, "batch_size": 50},
    "videos": {"n": 1, "guidance": 3.0, "steps": 50, "batch_size": 1},
}
_ONLY = {
    "images": ("classes", "guidance_channels"),
    "videos": ("prompts", "prompt", "frames", "size", "rate"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `mhla sample`."""
    add_trained_arguments(parser, "diffusion_run")
    parser.add_argument(
        "--n", type=int, help="images over all classes (default: 100), or videos of each prompt (default: 1)"
    )
    parser.add_argument(
        "--guidance",
        type=float,
        help="scale of classifier-free guidance; 1 is none (default: 1.5, of videos 3)",
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
            "ddpm, ddim or dpm++ (default: ddpm); of flow matching euler or dpm++ (default: euler for "
            "images, dpm++ for videos)"
        ),
    )
    parser.add_argument("--steps", type=int, help="default: 250, of videos 50")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument(
        "--batch-size", type=int, metavar="N", help="images at once (default: 50), or videos (default: 1)"
    )
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="default: %(default)s")
    parser.add_argument("--out", metavar="DIR", help="default: images/NAME or videos/NAME in the run folder")
    parser.add_argument("--json", metavar="FILE", help="write what was drawn and how fast, as JSON")
    images = parser.add_argument_group("images")
    images.add_argument("--classes", metavar="0-9,12", help="labels, taken in turn (default: all)")
    images.add_argument(
        "--guidance-channels",
        type=int,
        metavar="C",
        help="guide the first C channels only, 3 as the original DiT (default: all)",
    )
    add_video_arguments(parser.add_argument_group("videos"))


def add_video_arguments(parser: Any) -> None:
    """What videos alone are asked for."""
    parser.add_argument(
        "--prompts", metavar="FILE", help='a prompt a line, or .jsonl with {"prompt": ...} in every line'
    )
    parser.add_argument(
        "--prompt", metavar="TEXT", action="append", help="a prompt; may be given several times"
    )
    parser.add_argument("--frames", type=int, metavar="F", help="default: those of training")
    parser.add_argument(
        "--size", metavar="HxW", help="height and width in pixels, e.g. 480x800 (default: those of training)"
    )
    parser.add_argument(
        "--rate",
        type=float,
        metavar="R",
        help="frames a second of the files (default: those of the run's data)",
    )


def run(args: argparse.Namespace) -> int:
    """Carries out the verb; returns the exit code."""
    check_common(args)
    check_json(args.json)
    classes = None if args.classes is None else parse_classes(args.classes)
    from mhla_lightning.inference.rebuilding import trains
    from mhla_lightning.runs.folder import find_run, runs_root
    from mhla_lightning.tasks import VideoDiffusionTask

    folder = find_run(args.diffusion_run, runs_root(args.runs))
    kind, other = ("videos", "images") if trains(folder, VideoDiffusionTask) else ("images", "videos")
    for name in _ONLY[other]:
        if getattr(args, name) is not None:
            raise UserError(
                f"--{name.replace('_', '-')} is for runs that draw {other}, and run {folder.run_id} "
                f"draws {kind}; leave it out"
            )
    for name, value in _DEFAULTS[kind].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return _videos(args) if kind == "videos" else _images(args, classes)


def check_common(args: argparse.Namespace) -> None:
    """Raises UserError for counts below 1 and a seed that is none."""
    for name in ("n", "batch_size", "processes", "steps", "frames"):
        value = getattr(args, name, None)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    if args.rate is not None and not 0 < args.rate <= _FASTEST:
        raise UserError(f"--rate is {args.rate:g}; it must be above 0 and at most {_FASTEST}")
    if not 0 <= args.seed < 2**32:
        raise UserError(f"--seed is {args.seed}; a seed lies in 0 to 4294967295")


def _images(args: argparse.Namespace, classes: list[int] | None) -> int:
    from mhla_lightning.diffusion import Guidance, default_sampler
    from mhla_lightning.inference.diffusion.image_job import ImageJob, draw_images
    from mhla_lightning.inference.diffusion.images import Drawing, find_image_run
    from mhla_lightning.inference.diffusion.parts import job_name
    from mhla_lightning.inference.weights import choose_device

    device = choose_device(args.device)
    found = find_image_run(args.diffusion_run, args.runs, args.ckpt, ema=not args.no_ema)
    classes = classes or list(range(found.task.num_classes))
    labels = tuple(classes[number % len(classes)] for number in range(args.n))
    sampler = args.sampler or default_sampler(found.task.process)
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
    _say(
        found,
        f"{len(images)} images",
        seconds,
        {"images": folder / "samples.npz", "grid": folder / "grid.png"},
    )
    write_json(
        args.json, {**job.settings(), "folder": str(folder), "images": len(images), "seconds": seconds}
    )
    return 0


def _videos(args: argparse.Namespace) -> int:
    prompts = given_prompts(args.prompts, args.prompt)
    if not prompts:
        raise UserError(
            "no prompt was given; name a file with --prompts FILE, or write one with --prompt TEXT"
        )
    sample_videos(args, prompts)
    return 0


def sample_videos(args: argparse.Namespace, prompts: list[Any]) -> Path:
    """Draws args.n videos of each prompt and says so; the folder that holds them. Raises UserError."""
    from mhla_lightning.inference.diffusion.parts import job_name
    from mhla_lightning.inference.diffusion.video_job import LIST, SHEET, VideoJob, draw_videos, frame_rate
    from mhla_lightning.inference.diffusion.videos import find_video_run
    from mhla_lightning.inference.weights import choose_device

    device = choose_device(args.device)
    found = find_video_run(args.diffusion_run, args.runs, args.ckpt, ema=not args.no_ema)
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
    _say(
        found,
        f"{len(files)} videos",
        seconds,
        {"videos": folder, "sheet": folder / SHEET, "list": folder / LIST},
    )
    write_json(args.json, {**job.settings(), "folder": str(folder), "videos": len(files), "seconds": seconds})
    return folder


def given_prompts(file: str | None, texts: list[str] | None) -> list[Any]:
    """Prompts of --prompts and --prompt. Raises UserError for a file that holds none."""
    from mhla_lightning.inference.diffusion.prompts import Prompt, read_prompts

    return [*(read_prompts(file) if file else []), *(Prompt(text, "--prompt") for text in texts or [])]


def video_drawing(args: argparse.Namespace, found: Any) -> Any:
    """How videos of a run are drawn, with those of training where --frames or --size is not given. Raises
    UserError.
    """
    from mhla_lightning.diffusion import Guidance
    from mhla_lightning.inference.diffusion.videos import Size, VideoDrawing, training_size, video_sampler

    size = None if args.size is None else parse_size(args.size)
    own = training_size(found) if size is None or args.frames is None else None
    frames = args.frames if own is None or args.frames is not None else own.frames
    height, width = size or (own.height, own.width)  # type: ignore[union-attr]  # one of them is there
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
    """A progress bar on a terminal; what it gives is called with how many more are done."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("drawing", total=total)
        yield lambda count: progress.advance(bar, count)


def _say(found: Any, what: str, seconds: float, places: dict[str, Path]) -> None:
    from rich.console import Console

    console, average = Console(), "averaged" if found.averaged else "raw"
    console.print(
        f"{what} of {found.run.run_id} {found.checkpoint.name} ({average} weights) in {seconds:.1f} s",
        soft_wrap=True,
    )
    for name, place in places.items():
        console.print(f"{name + ':':8}{place}", soft_wrap=True, highlight=False)


def parse_classes(text: str) -> list[int]:
    """`0-9,12` -> [0, ..., 9, 12]. Raises UserError."""
    found: list[int] = []
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise UserError(
                f"--classes {text}: '{part}' is no class and no range; write 3 or 0-9, with commas "
                "between them"
            )
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    return found


def parse_size(text: str) -> tuple[int, int]:
    """`480x800` -> (480, 800). Raises UserError."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or not int(match[1]) or not int(match[2]):
        raise UserError(f"--size {text} is no size; write height and width in pixels, e.g. 480x800")
    return int(match[1]), int(match[2])


def write_grid(images: object, columns: int, path: Path) -> None:
    """uint8 (N, H, W, 3) as one PNG, so many beside each other."""
    import torch
    from PIL import Image
    from torchvision.utils import make_grid

    tiles = torch.as_tensor(images).permute(0, 3, 1, 2)
    Image.fromarray(make_grid(tiles, nrow=columns, padding=1).permute(1, 2, 0).numpy()).save(path)
