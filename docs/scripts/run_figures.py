"""Figures of runs: measured results, mixing matrices, generated code, drawn digits and clips."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

import mhla_lightning as mhla
from docs.scripts.pages import ROOT
from mhla_lightning.attention.mhla import MixingMatrix
from mhla_lightning.inference.rebuilding import load_backbone, rebuild
from mhla_lightning.inference.weights import find_weights
from mhla_lightning.runs.folder import RunFolder
from mhla_lightning.tasks import LanguageTask

PROMPT = "def read(self"
FILMS = [
    "a big grey rabbit comes out of its burrow and stretches",
    "traffic and bicycles in the streets of a city",
    "a man with a red bow tie talks in a moving car",
]
_COLORS = {"linear": "#f28e2b", "softmax": "#8a8f98", "mhla": "#2f6fde"}


def results(file: Path) -> None:
    """Draw bits a byte at the trained length and at four times it, as docs/results.md records them."""
    numbers = recorded_bits((ROOT / "docs" / "results.md").read_text(encoding="utf-8"))
    figure = _figure(8.0, 2.3)
    titles = ("256 tokens, as in training", "1,024 tokens")
    for number, (panel, title) in enumerate(zip(figure.subplots(1, 2, sharey=True), titles, strict=True)):
        for row, bits in numbers.items():
            panel.barh(row, bits[number], color=_COLORS[row])
            panel.text(bits[number] + 0.03, row, f"{bits[number]:.2f}", va="center", fontsize=10)
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("bits a byte of held-out code; lower is better", fontsize=9)
        panel.set_xlim(0, 3.7)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=130)


def recorded_bits(text: str) -> dict[str, tuple[float, float]]:
    """Return operator -> bits a byte at 256 and at 1,024 tokens, of the row `language_quality`.

    Args:
        text: of docs/results.md.
    """
    row = next(line for line in text.splitlines() if "--variants language_quality" in line)
    names = {"linear": "linear", "mhla": "local, the preset `paper`,", "softmax": "softmax"}
    found = {
        name: re.search(rf"{re.escape(words)} ([\d.]+) \(([\d.]+)\)", row) for name, words in names.items()
    }
    return {name: (float(match[1]), float(match[2])) for name, match in found.items() if match}


def mixing(file: Path) -> None:
    """Draw the mixing matrices of the language model's layers, after training."""
    run = RunFolder(stdlib())
    task = load_backbone(
        rebuild(run, LanguageTask, "the figure needs a language model").task,
        find_weights(run, None, False),
        "cpu",
    )
    layers = [module.matrix().detach() for module in task.modules() if isinstance(module, MixingMatrix)]
    figure = _figure(8.0, 2.3)
    panels = figure.subplots(1, len(layers))
    top = max(float(layer.max()) for layer in layers)
    for number, (panel, layer) in enumerate(zip(panels, layers, strict=True)):
        image = panel.imshow(layer.numpy(), cmap="viridis", vmin=0, vmax=top)
        panel.set_title(f"layer {number}", fontsize=10)
        panel.set_xlabel("key chunk", fontsize=9)
    panels[0].set_ylabel("query chunk", fontsize=9)
    figure.colorbar(image, ax=panels, shrink=0.9)
    figure.savefig(file, dpi=130)


def stdlib() -> Path:
    """Return the run of the language model, trained where it is missing."""
    return mhla.run("language/lm_tiny_mhla_stdlib_cpu", run_id="stdlib").folder


def written_code() -> str:
    """Return a prompt and what the language model writes after it."""
    (done,) = mhla.generate(stdlib(), PROMPT, max_new_tokens=420, temperature=0.7, seed=1)
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
    """Draw a clip of each film side by side, as one moving picture."""
    run = mhla.run("video_dit/wan_tiny_mhla_clips_cpu", run_id="films")
    drawn = mhla.sample(run.folder, prompt=FILMS, n=1, guidance=2.0, steps=30)
    side_by_side(drawn.files["videos"], file)


def side_by_side(folder: Path, file: Path) -> None:
    """Write the videos of a folder, in the order of their names, as one animated WebP.

    Args:
        folder: with mp4 files of one size and length.
        file: to write.
    """
    import av

    videos = []
    for video in sorted(folder.glob("*.mp4")):
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
