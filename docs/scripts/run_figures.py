"""Figures of runs: curves of a comparison, mixing matrices, generated code, drawn digits and clips."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

import mhla_lightning as mhla
from mhla_lightning.attention.mhla import MixingMatrix
from mhla_lightning.inference.rebuilding import load_backbone, rebuild
from mhla_lightning.inference.weights import find_weights
from mhla_lightning.runs.folder import RunFolder, read_metrics
from mhla_lightning.tasks import Task

COMPARED = ("language/lm_tiny_mhla_stdlib_cpu", "language_operators")
"""Recipe and variants of the comparison; its row `mhla` also gives the mixing matrices and the code."""
PROMPT = "def read(self"
FILM = "a big grey rabbit comes out of its burrow and stretches"
_OPERATORS = {"linear": "#f28e2b", "softmax": "#8a8f98", "mhla": "#2f6fde"}
_TAGS = {"val/bits_per_byte": "256 tokens, as trained", "val_1024/bits_per_byte": "1,024 tokens"}


def comparison() -> Path:
    """Return the folder of the comparison, trained where it is missing."""
    return mhla.compare_recipe(COMPARED[0], variants=COMPARED[1]).folder


def compared_run(row: str) -> RunFolder:
    """Return the run of a row of the comparison."""
    (found,) = (path for path in comparison().iterdir() if path.is_dir() and path.name.startswith(row))
    return RunFolder(found)


def curves(file: Path) -> None:
    """Draw bits a byte over the steps, a panel for each length of text."""
    figure = _figure(8.0, 3.0)
    for panel, (tag, title) in zip(figure.subplots(1, 2, sharey=True), _TAGS.items(), strict=True):
        for row, color in _OPERATORS.items():
            points = read_metrics(compared_run(row).metrics)[tag]
            panel.plot(*zip(*points, strict=True), color=color, label=row, linewidth=2)
            panel.annotate(f" {points[-1][1]:.2f}", points[-1], color=color, va="center", fontsize=9)
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("optimizer steps", fontsize=9)
        panel.margins(x=0.14)
        panel.grid(alpha=0.3)
    figure.axes[0].set_ylabel("bits a byte, held-out code", fontsize=9)
    figure.axes[0].legend(fontsize=9)
    figure.savefig(file, dpi=130)


def mixing(file: Path) -> None:
    """Draw the mixing matrices of the language model's layers, after training."""
    run = compared_run("mhla")
    task = rebuild(run, Task, "the figure needs a task").task
    task = load_backbone(task, find_weights(run, None, ema=False), "cpu")
    layers = [module.matrix().detach() for module in task.modules() if isinstance(module, MixingMatrix)]
    figure = _figure(8.0, 2.7)
    top = max(float(layer.max()) for layer in layers)
    for number, (panel, layer) in enumerate(zip(figure.subplots(1, len(layers)), layers, strict=True)):
        image = panel.imshow(torch.atleast_2d(layer).numpy(), cmap="viridis", vmin=0, vmax=top)
        panel.set_title(f"layer {number}", fontsize=10)
        panel.set_xlabel("key chunk", fontsize=9)
    figure.axes[0].set_ylabel("query chunk", fontsize=9)
    figure.colorbar(image, ax=figure.axes, shrink=0.9)
    figure.savefig(file, dpi=130)


def written_code() -> str:
    """Return a prompt and what the language model writes after it."""
    (done,) = mhla.generate(
        compared_run("mhla").path, PROMPT, max_new_tokens=420, temperature=0.5, extrapolation="shift", seed=1
    )
    return PROMPT + done.text


def digits(file: Path) -> None:
    """Draw two rows of digits."""
    run = mhla.run("image_dit/dit_tiny_mhla_mnist_cpu", run_id="digits")
    drawn = mhla.sample(run.folder, classes="0-9", n=20, guidance=2.0, steps=40, seed=1)
    with np.load(drawn.files["images"]) as arrays:
        images = arrays["arr_0"]
    grid = images.reshape(2, 10, *images.shape[1:]).transpose(0, 2, 1, 3, 4).reshape(64, 320, -1)
    gray = Image.fromarray(grid).convert("L")
    gray.resize((960, 192), Image.Resampling.LANCZOS).save(file, optimize=True)


def clips(file: Path) -> None:
    """Draw four clips side by side, as one moving picture."""
    import av

    run = mhla.run("video_dit/wan_tiny_mhla_clips_cpu", run_id="films")
    drawn = mhla.sample(run.folder, prompt=[FILM], n=4, guidance=2.0, steps=30)
    videos = []
    for video in sorted(drawn.files["videos"].glob("*.mp4")):
        with av.open(str(video)) as container:
            videos.append([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    frames = [Image.fromarray(np.concatenate(parts, 1)) for parts in zip(*videos, strict=True)]
    large = [frame.resize((frame.width * 5, frame.height * 5), Image.Resampling.LANCZOS) for frame in frames]
    large[0].save(file, save_all=True, append_images=large[1:], duration=90, loop=0, quality=70)


def _figure(width: float, height: float) -> Figure:
    """A figure with a light ground, for pages of any ground."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure
