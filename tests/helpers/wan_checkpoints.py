"""Small checkpoints with every key of Wan2.1 and of the MHLA authors (SPEC 6.8), written out here
independently of our tables of names.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

DIM, FFN, HEADS, DEPTH, CHANNELS, TEXT, FREQ = 24, 40, 2, 3, 4, 10, 16
LAYOUT = (2, 2, 3)
OPTIONS: dict[str, Any] = {"input_size": [4, 4, 6], "text_length": 6}
SIZES: dict[str, Any] = {
    "embed_dim": DIM,
    "ffn_dim": FFN,
    "num_heads": HEADS,
    "depth": DEPTH,
    "in_channels": CHANNELS,
}
ALL_OPTIONS: dict[str, Any] = {**OPTIONS, **SIZES, "text_dim": TEXT, "freq_dim": FREQ}
"""What the backbone of such a checkpoint is built from; the first part stands in no tensor."""


def theirs() -> Any:
    """diffusers' model of these sizes, with its own random weights."""
    sizes = {
        "num_attention_heads": HEADS,
        "attention_head_dim": DIM // HEADS,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
    }
    torch.manual_seed(0)
    return _diffusers()(**sizes, text_dim=TEXT, freq_dim=FREQ, ffn_dim=FFN, num_layers=DEPTH).eval()


def opened(folder: Path, strict: bool) -> Any:
    """diffusers' model of an exported folder: its from_pretrained demands the package accelerate for this
    model, so its parts are called here.
    """
    config = json.loads((folder / "config.json").read_text())
    model = _diffusers().from_config(config)
    model.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"), strict=strict)
    return model.eval()


def _diffusers() -> Any:
    return pytest.importorskip("diffusers").WanTransformer3DModel


def wan_shapes(depth: int = DEPTH) -> dict[str, tuple[int, ...]]:
    """Wan2.1's own names and shapes."""
    linears = {
        "text_embedding.0": (DIM, TEXT),
        "text_embedding.2": (DIM, DIM),
        "time_embedding.0": (DIM, FREQ),
        "time_embedding.2": (DIM, DIM),
    }
    linears |= {"time_projection.1": (6 * DIM, DIM), "head.head": (4 * CHANNELS, DIM)}
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embedding.weight": (DIM, CHANNELS, 1, 2, 2),
        "patch_embedding.bias": (DIM,),
    }
    shapes["head.modulation"] = (1, 2, DIM)
    for i in range(depth):
        block = f"blocks.{i}"
        for attention in ("self_attn", "cross_attn"):
            linears |= {f"{block}.{attention}.{name}": (DIM, DIM) for name in "qkvo"}
            shapes |= {f"{block}.{attention}.norm_{name}.weight": (DIM,) for name in "qk"}
        linears |= {f"{block}.ffn.0": (FFN, DIM), f"{block}.ffn.2": (DIM, FFN)}
        shapes |= {
            f"{block}.modulation": (1, 6, DIM),
            f"{block}.norm3.weight": (DIM,),
            f"{block}.norm3.bias": (DIM,),
        }
    for name, (rows, columns) in linears.items():
        shapes |= {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
    return shapes


def mhla_shapes(
    layer: int, blocks: int, gate: bool = False, lepe: bool = False
) -> dict[str, tuple[int, ...]]:
    """What the MHLA authors add to a layer."""
    added: dict[str, tuple[int, ...]] = {
        "block_attn.conv.weight": (blocks, blocks, 1, 1),
        "g_norm.weight": (DIM // HEADS,),
    }
    if gate:
        added |= {"g.weight": (DIM, DIM), "g.bias": (DIM,)}
    if lepe:
        added |= {"lepe.weight": (DIM, 1, 3, 3, 3), "lepe.bias": (DIM,)}
    return {f"blocks.{layer}.self_attn.{name}": shape for name, shape in added.items()}


def filled(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Normal values; those of mixing matrices reach below 0 and beyond 1 too (SPEC V8)."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator) * (1.0 if "block_attn" in name else 0.2)
        for name, shape in shapes.items()
    }


def plain_wan(depth: int = DEPTH) -> dict[str, Tensor]:
    """Wan2.1: softmax in every layer."""
    return filled(wan_shapes(depth))


def hybrid_wan(blocks: int = 12) -> dict[str, Tensor]:
    """Every key that there is: softmax, then MHLA, then MHLA with gate and convolution."""
    return filled({**wan_shapes(), **mhla_shapes(1, blocks), **mhla_shapes(2, blocks, gate=True, lepe=True)})
