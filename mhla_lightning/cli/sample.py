"""Draws images from an image diffusion run: samples.npz (ADM's layout) and a grid.

  mhla sample RUN --classes 0-9 --n 100 --guidance 1.5 --sampler ddpm --steps 250 --seed 0
The same command again goes on where it was stopped. Image i of a seed is the same for any batch size and number of processes.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from mhla_lightning.cli.bench.report import check_json, write_json
from mhla_lightning.cli.trained import add_trained_arguments
from mhla_lightning.errors import UserError

_RANGE = re.compile(r"(\d+)(?:-(\d+))?")
_GRID = 100  # images at most


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `mhla sample`."""
    add_trained_arguments(parser, "image_run")
    parser.add_argument("--classes", metavar="0-9,12", help="labels, taken in turn (default: all)")
    parser.add_argument("--n", type=int, default=100, help="images, over all classes (default: %(default)s)")
    parser.add_argument("--guidance", type=float, default=1.5, help="scale of classifier-free guidance; 1 is none (default: %(default)s)")
    parser.add_argument("--guidance-channels", type=int, metavar="C", help="guide the first C channels only, 3 as the original DiT (default: all)")
    parser.add_argument(
        "--guidance-interval", type=float, nargs=2, default=(0.0, 1.0), metavar=("LOW", "HIGH"), help="part of the time axis that is guided"
    )
    parser.add_argument("--sampler", default=None, help="ddpm, ddim or dpm++ (default: ddpm); of flow matching euler or dpm++ (default: euler)")
    parser.add_argument("--steps", type=int, default=250, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=50, metavar="N", help="images at once (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="default: %(default)s")
    parser.add_argument("--out", metavar="DIR", help="default: images/NAME in the run folder")
    parser.add_argument("--json", metavar="FILE", help="write what was drawn and how fast, as JSON")


def run(args: argparse.Namespace) -> int:
    """Carries out the verb; returns the exit code."""
    for name in ("n", "batch_size", "processes", "steps"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1")
    if not 0 <= args.seed < 2**32:
        raise UserError(f"--seed is {args.seed}; a seed lies in 0 to 4294967295")
    check_json(args.json)
    classes = None if args.classes is None else parse_classes(args.classes)
    import time

    from rich.console import Console
    from rich.progress import Progress

    from mhla_lightning.diffusion import Guidance, default_sampler
    from mhla_lightning.generation.image_job import ImageJob, draw_images
    from mhla_lightning.generation.images import Drawing, find_image_run
    from mhla_lightning.generation.weights import choose_device

    device = choose_device(args.device)
    found = find_image_run(args.image_run, args.runs, args.ckpt, ema=not args.no_ema)
    classes = classes or list(range(found.task.num_classes))
    labels = tuple(classes[number % len(classes)] for number in range(args.n))
    sampler = args.sampler or default_sampler(found.task.process)
    guidance = Guidance(args.guidance, args.guidance_channels, tuple(args.guidance_interval))
    job = ImageJob(found, labels, Drawing(args.seed, sampler, args.steps, guidance), args.batch_size)
    folder = Path(args.out) if args.out else found.run.path / "images" / job.name()
    console = Console()
    started, drawn = time.perf_counter(), []
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("drawing", total=len(labels))

        def on_batch(count: int) -> None:
            drawn.append(count)
            progress.advance(bar, count)

        images = draw_images(job, folder, args.processes, device, on_batch)
    seconds = time.perf_counter() - started
    columns = min(len(classes), 10) if len(classes) > 1 else 10
    write_grid(images[:_GRID], columns, folder / "grid.png")
    average = "averaged" if found.averaged else "raw"
    console.print(f"{len(images)} images of {found.run.run_id} {found.checkpoint.name} ({average} weights) in {seconds:.1f} s", soft_wrap=True)
    console.print(f"images: {folder / 'samples.npz'}\ngrid:   {folder / 'grid.png'}", soft_wrap=True, highlight=False)
    write_json(args.json, {**job.settings(), "folder": str(folder), "images": len(images), "seconds": seconds})
    return 0


def parse_classes(text: str) -> list[int]:
    """`0-9,12` -> [0, ..., 9, 12]. Raises UserError."""
    found: list[int] = []
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise UserError(f"--classes {text}: '{part}' is no class and no range; write 3 or 0-9, with commas between them")
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    return found


def write_grid(images: object, columns: int, path: Path) -> None:
    """uint8 (N, H, W, 3) as one PNG, so many beside each other."""
    import torch
    from PIL import Image
    from torchvision.utils import make_grid

    tiles = torch.as_tensor(images).permute(0, 3, 1, 2)
    Image.fromarray(make_grid(tiles, nrow=columns, padding=1).permute(1, 2, 0).numpy()).save(path)
