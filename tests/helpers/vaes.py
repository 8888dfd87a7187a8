"""Small autoencoders of diffusers and text encoders of transformers with random weights, and images and
clips for them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mhla_lightning.data.index import Clip, ShardIndex
from mhla_lightning.data.prepare.samples import Sample, npy_bytes
from mhla_lightning.data.prepare.writer import write_split

FACTOR, SIZE = 4, 16  # pixels a place of a latent, and a side of the images that are encoded
CAPTIONS = ("a red cat", "a dog at the left", "two birds")


def save_kl(folder: Path, seed: int = 0, spread: float = 1.0, **config: object) -> str:
    """An AutoencoderKL, factor 4, 4 channels, scale 0.5, shift 0.25. spread: of its latents, so that
    images differ visibly.
    """
    from diffusers import AutoencoderKL

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        options = {
            "scaling_factor": 0.5,
            "shift_factor": 0.25,
            "norm_num_groups": 4,
            "latent_channels": 4,
        } | config
        down, up = ("DownEncoderBlock2D",) * 3, ("UpDecoderBlock2D",) * 3
        model: Any = AutoencoderKL(
            block_out_channels=(4, 8, 8), down_block_types=down, up_block_types=up, **options
        )
        if model.quant_conv is not None:
            model.quant_conv.weight.data.mul_(spread)
        model.save_pretrained(folder)
    return str(folder)


def save_dc(folder: Path, seed: int = 0) -> str:
    """An AutoencoderDC, factor 4, 8 channels, scale 0.4."""
    from diffusers import AutoencoderDC

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = AutoencoderDC(
            latent_channels=8,
            attention_head_dim=8,
            encoder_block_out_channels=(8, 16, 16),
            decoder_block_out_channels=(8, 16, 16),
            encoder_layers_per_block=(1, 1, 1),
            decoder_layers_per_block=(1, 1, 1),
            encoder_qkv_multiscales=((), (), ()),
            decoder_qkv_multiscales=((), (), ()),
            scaling_factor=0.4,
        )
        model.save_pretrained(folder)
    return str(folder)


def save_images(folder: Path, train: int = 12, val: int = 4, size: tuple[int, int] = (SIZE, SIZE)) -> Path:
    """Noisy RGB images of two classes, FOLDER/SPLIT/CLASS/*.png. size: (width, height)."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for number in range(count):
            path = folder / split / "ab"[number % 2] / f"{number:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)
    return folder


def save_wan(folder: Path, seed: int = 0, **config: object) -> str:
    """An AutoencoderKLWan of 4 channels that makes one place of 4 frames and of 4 x 4 pixels, as Wan2.1's
    does of 4 frames and 8 x 8.
    """
    from diffusers import AutoencoderKLWan

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        statistics = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [0.5, 1.0, 2.0, 1.5]}
        options = (
            {
                "base_dim": 4,
                "z_dim": 4,
                "dim_mult": [1, 2, 2],
                "num_res_blocks": 1,
                "temperal_downsample": [True, True],
            }
            | statistics
            | config
        )
        model: Any = AutoencoderKLWan(scale_factor_spatial=4, **options)
        model.save_pretrained(folder)
    return str(folder)


def save_umt5(folder: Path, seed: int = 0, pipeline: bool = False, **config: object) -> str:
    """A UMT5EncoderModel of 24 channels and a tokenizer of letters. pipeline: in text_encoder/ and
    tokenizer/, as diffusers lays them out.
    """
    from transformers import UMT5Config, UMT5EncoderModel
    from transformers.utils import logging

    vocabulary, tokenizer = _letters("</s>", "$A </s>")
    logging.disable_progress_bar()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sizes = {
            "d_model": 24,
            "d_kv": 6,
            "d_ff": 32,
            "num_layers": 2,
            "num_heads": 4,
            "vocab_size": vocabulary,
        }
        model: Any = UMT5EncoderModel(UMT5Config(**(sizes | config)))
    model.save_pretrained(folder / "text_encoder" if pipeline else folder)
    tokenizer.save_pretrained(folder / "tokenizer" if pipeline else folder)
    return str(folder)


def save_gemma2(folder: Path, seed: int = 0) -> str:
    """A Gemma2Model of 24 channels and a tokenizer of letters, as a pipeline of SANA lays them out."""
    from transformers import Gemma2Config, Gemma2Model
    from transformers.utils import logging

    vocabulary, tokenizer = _letters("<bos>", "<bos> $A")
    logging.disable_progress_bar()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = Gemma2Config(
            vocab_size=vocabulary,
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
        )
        Gemma2Model(config).save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    return str(folder)


def _letters(special: str, template: str) -> tuple[int, Any]:
    """The size of a vocabulary of small letters, and its tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = ["<pad>", special, "<unk>", *"abcdefghijklmnopqrstuvwxyz "]
    letters = Tokenizer(
        models.WordLevel({piece: number for number, piece in enumerate(pieces)}, unk_token="<unk>")
    )
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    letters.post_processor = processors.TemplateProcessing(single=template, special_tokens=[(special, 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=letters, pad_token="<pad>", eos_token=special, unk_token="<unk>"
    )
    return len(pieces), tokenizer


def save_clips(
    folder: Path,
    clip: Clip,
    counts: dict[str, int],
    captions: tuple[str, ...] = ("a red cat", "a dog runs", ""),
    shard_bytes: int = 0,
) -> Path:
    """Packed clips of noise that slowly moves, FOLDER/SPLIT; captions in turn. shard_bytes: 0 takes about
    three clips a shard.
    """
    rng = np.random.default_rng(clip.frames * clip.height)
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in counts.items():
        samples = []
        for number in range(count):
            still = rng.integers(0, 256, (clip.height, clip.width, 3), dtype=np.uint8)
            frames = np.stack([np.roll(still, frame, axis=1) for frame in range(clip.frames)])
            samples.append(
                Sample(
                    f"c{number}",
                    {"clip.npy": npy_bytes(frames), "txt": captions[number % len(captions)].encode()},
                )
            )
        write_split(
            folder / split,
            ShardIndex("clips", (), clip=clip),
            samples,
            shard_bytes or 3 * clip.frames * clip.height * clip.width * 3,
        )
    return folder


def save_captioned(folder: Path, count: int = 10, size: tuple[int, int] = (SIZE, SIZE)) -> Path:
    """Noisy RGB images with captions beside them, FOLDER/NAME.png and NAME.txt; some in a folder below."""
    rng = np.random.default_rng(0)
    for number in range(count):
        path = folder / ("more" if number % 3 == 0 else ".") / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)
        path.with_suffix(".txt").write_text(f"{CAPTIONS[number % len(CAPTIONS)]}\n")
    return folder
