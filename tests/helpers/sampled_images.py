"""A folder like one of `mhla sample` for images, and a small random CLIP model of transformers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

SIDE = 16


def write_sampled(folder: Path, prompts: Sequence[str], size: tuple[int, int] = (SIDE, SIDE)) -> list[Path]:
    """Write an image of noise for each prompt, and samples.json. size: (height, width)."""
    folder.mkdir(parents=True)
    files = []
    for number, _ in enumerate(prompts):
        pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
        files.append(folder / f"{number:04d}-x.png")
        Image.fromarray(pixels).save(files[-1])
    rows = [{"file": file.name, "prompt": prompt} for file, prompt in zip(files, prompts, strict=True)]
    (folder / "samples.json").write_text(json.dumps({"images": rows}))
    return files


def save_clip(folder: Path, tokens: int = 12) -> str:
    """A CLIPModel for images of 16 x 16 pixels, a tokenizer of letters, and the image processor."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    folder.mkdir(parents=True)
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    first, last = len(words) - 2, len(words) - 1
    special = {"bos_token_id": first, "eos_token_id": last, "pad_token_id": last}
    config = CLIPConfig(
        text_config={**sizes, **special, "vocab_size": len(words), "max_position_embeddings": tokens},
        vision_config={**sizes, "image_size": SIDE, "patch_size": 8},
        projection_dim=8,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        CLIPModel(config).save_pretrained(str(folder))
    square = {"height": SIDE, "width": SIDE}
    CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=square).save_pretrained(str(folder))
    return str(folder)
