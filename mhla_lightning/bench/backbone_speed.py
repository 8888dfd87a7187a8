"""Forward and backward of whole backbones at several sizes.

A family of backbones turns a size into options and inputs; a case of bench.timing measures it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any, cast

import torch
from torch import Tensor, nn

from mhla_lightning.attention import BlockGrid
from mhla_lightning.backbones import (
    IMAGE_DIFFUSION,
    TEXT_TO_IMAGE,
    VIDEO_DIFFUSION,
    Backbone,
    DiT,
    SanaDiT,
    VideoDiT,
    build_backbone,
)
from mhla_lightning.bench.timing import Case, force_flash
from mhla_lightning.errors import UserError, unknown_name
from mhla_lightning.planning.memory import peak_bytes
from mhla_lightning.planning.torch_modes import FakeTensorMode

VAE_STRIDE = 8  # pixels a side of one latent pixel of Stable Diffusion's VAE
SANA_STRIDE = 32  # the same of SANA's autoencoder
WAN_STRIDE = (
    4,
    8,
    8,
)  # frames, rows and columns of one latent pixel of Wan2.1's VAE; the first frame stands alone

Size = int | tuple[int, int, int]
"""Pixels a side of an image, or (frames, height, width) of a clip."""


@dataclass(frozen=True)
class BackboneFamily:
    """Backbones that are measured alike.

    Attributes:
        key: what a size is called, in the command (`--res`) and in the rows.
        unit: what is counted by the second.
        sizes: those that are measured where none are given.
        attention: the entries that are compared where none are given, as YAML.
        pos_conv: of entries that name none; None leaves it to the family's presets.
        options: size -> the backbone's options. Raises UserError for a size that does not fit.
        inputs: (model, batch) -> arguments of its forward.
        blocks: tokens per axis -> mhla's blocks.
        by_layer: the forward is also measured alone, times are also given by layer, and peak memory is found
            on tensors without data: one step of a large clip can take many minutes.
    """

    key: str
    unit: str
    sizes: tuple[Size, ...]
    attention: str
    pos_conv: str | None
    options: Callable[[Any], dict[str, Any]]
    inputs: Callable[[Any, int], tuple[Tensor, ...]]
    blocks: Callable[[tuple[int, ...]], int | tuple[int, ...]]
    by_layer: bool = False


def _latent_options(pixels: int, stride: int = VAE_STRIDE) -> dict[str, Any]:
    if pixels < stride or pixels % stride:
        near = max(1, round(pixels / stride)) * stride
        raise UserError("res", f"{pixels} is no multiple of {stride}, the VAE's stride; use {near}")
    return {"input_size": pixels // stride}


def _latent_inputs(model: DiT, batch: int) -> tuple[Tensor, ...]:
    latents = torch.randn(batch, model.in_channels, *model.input_size)
    return latents, torch.randint(1000, (batch,)), torch.randint(model.num_classes, (batch,))


def _text_inputs(model: SanaDiT | VideoDiT, batch: int) -> tuple[Tensor, ...]:
    samples = torch.randn(batch, model.in_channels, *model.input_size)
    return samples, 1000 * torch.rand(batch), torch.randn(batch, model.text_length, model.text_dim)


def _wan_options(clip: tuple[int, int, int]) -> dict[str, Any]:
    frames, height, width = clip
    near = [1 + WAN_STRIDE[0] * round((frames - 1) / WAN_STRIDE[0])]
    near += [16 * max(1, round(side / 16)) for side in (height, width)]  # the VAE's 8 times the patch's 2
    if list(clip) != near:
        raise UserError(
            "video",
            f"{video_name(clip)} does not fit: Wan2.1 takes 4 n + 1 frames, height and width in steps "
            f"of 16; use {video_name(near)}",
        )
    return {
        "input_size": ((frames - 1) // WAN_STRIDE[0] + 1, height // WAN_STRIDE[1], width // WAN_STRIDE[2])
    }


def _pixel_options(clip: tuple[int, int, int]) -> dict[str, Any]:
    return {"input_size": clip}


def video_name(clip: Sequence[int]) -> str:
    """(81, 480, 800) -> 81x480x800, as --video takes it."""
    return "x".join(map(str, clip))


def blocks_for(grid: tuple[int, ...]) -> int:
    """Return blocks per axis, the same on every axis, so that M^2 <= N.

    The result is the largest count that every axis takes. Full blocks win where they are at least half as
    many.
    """
    tokens, axes = torch.Size(grid).numel(), len(grid)
    fitting = [
        count for count in range(1, min(grid) + 1) if count ** (2 * axes) <= tokens and _takes(grid, count)
    ]
    full = [count for count in fitting if BlockGrid(grid, count).even]
    return full[-1] if 2 * full[-1] >= fitting[-1] else fitting[-1]


def _takes(grid: tuple[int, ...], count: int) -> bool:
    return all(-(-n // -(-n // count)) == count for n in grid)


def layout_for(grid: tuple[int, ...]) -> tuple[int, ...]:
    """Return blocks per axis so that M^2 <= N, for axes of unlike length.

    Candidates have at least half of the largest number of blocks. Among them layouts without short blocks
    win, then the nearest to cubes, then the most blocks. 21 x 30 x 50 tokens get the paper's (3, 5, 10).
    """
    tokens = math.prod(grid)
    counts = [[count for count in range(1, n + 1) if -(-n // -(-n // count)) == count] for n in grid]
    layouts = [layout for layout in product(*counts) if math.prod(layout) ** 2 <= tokens]
    most = max(map(math.prod, layouts))

    def worth(layout: tuple[int, ...]) -> tuple[bool, float, int]:
        blocks = BlockGrid(grid, layout)
        return blocks.even, -max(blocks.block_size) / min(blocks.block_size), blocks.num_blocks

    return max((layout for layout in layouts if 2 * math.prod(layout) >= most), key=worth)


IMAGES = BackboneFamily(
    "res",
    "images",
    (256, 512, 1024, 2048),
    "[softmax, linear, mhla]",
    "cpe3",
    _latent_options,
    _latent_inputs,
    blocks_for,
)
WAN = BackboneFamily(
    key="video",
    unit="clips",
    sizes=((29, 256, 256), (29, 512, 512), (81, 480, 800)),  # 2,048, 8,192 and the paper's 31,500 tokens
    attention="[softmax, linear, mhla, [softmax, mhla, mhla]]",
    pos_conv=None,
    options=_wan_options,
    inputs=_text_inputs,
    blocks=layout_for,
    by_layer=True,
)
SANA = replace(
    IMAGES,
    sizes=(1024, 2048, 4096),
    pos_conv=None,
    options=partial(_latent_options, stride=SANA_STRIDE),
    inputs=_text_inputs,
)
SANA_PIXELS = replace(SANA, sizes=(32, 64, 128), options=partial(_latent_options, stride=1))
VIDEO_PIXELS = replace(WAN, sizes=((16, 64, 64),), options=_pixel_options)
FAMILIES: dict[str, BackboneFamily] = {
    **dict.fromkeys(IMAGE_DIFFUSION, IMAGES),
    **dict.fromkeys(TEXT_TO_IMAGE, SANA),
    "sana_tiny": SANA_PIXELS,
    **dict.fromkeys(VIDEO_DIFFUSION, WAN),
    "wan_tiny": VIDEO_PIXELS,
}
"""Backbone -> family."""


def family_of(backbone: str) -> BackboneFamily:
    """The family of a backbone; UserError for one that has none."""
    if backbone not in FAMILIES:
        raise UserError("backbone", unknown_name("backbone", backbone, FAMILIES, of="bench backbone"))
    return FAMILIES[backbone]


def token_grid(backbone: str, options: Mapping[str, Any]) -> tuple[int, ...]:
    """Tokens per axis of a backbone with these options, which is not built."""
    with torch.device("meta"):
        return tuple(
            cast(Backbone, build_backbone(backbone, attention="softmax", **{**options, "depth": 1})).grid
        )


def layers_of(backbone: str) -> int:
    """How many layers a backbone has where nobody says."""
    with torch.device("meta"):
        return len(cast(Any, build_backbone(backbone, attention="softmax")).blocks)


Entry = Mapping[str, Any] | Sequence[Mapping[str, Any]]
"""What stands behind `attention`: one operator for all layers, or several that are cycled over them."""


def make_case(
    label: str,
    backbone: str,
    attention: Entry,
    options: Mapping[str, Any],
    batch: int,
    device: torch.device,
    *,
    bf16: bool = False,
    checkpointing: bool = False,
) -> Case:
    """Return a training step of a backbone on random inputs, float32 or under bf16 autocast."""
    family = family_of(backbone)

    def make() -> tuple[nn.Module, Callable[[], Any], Callable[[], None]]:
        model = build_backbone(backbone, attention=attention, **options)
        inputs = tuple(x.to(device) for x in family.inputs(model, batch))
        model = (
            model if device.type == "cpu" else model.to(device)
        ).train()  # tensors without data refuse .to(), even to where they are
        if checkpointing:
            cast(Any, model).set_grad_checkpointing(True)
        return model, *_work(model, inputs, device, bf16)

    model, forward, step = make()
    _wake(model)
    facts = cast(Backbone, model)
    case = Case(
        label,
        math.prod(facts.grid),
        batch * facts.flops(facts.grid),
        forward if family.by_layer else None,
        step,
        dtype=torch.bfloat16 if bf16 and device.type == "cuda" else torch.float32,
    )
    entries = [attention] if isinstance(attention, Mapping) else attention
    if any(entry["name"] == "softmax" for entry in entries):
        force_flash(case, device)
    if family.by_layer and device.type == "cpu":
        with FakeTensorMode():
            case.peak_bytes = peak_bytes(make()[2], device)
    else:
        case.peak_bytes = peak_bytes(case.run_step, device)
    return case


def _work(
    model: nn.Module, inputs: tuple[Tensor, ...], device: torch.device, bf16: bool
) -> tuple[Callable[[], Any], Callable[[], None]]:
    """A forward without gradients, and a training step."""

    def autocast() -> AbstractContextManager[Any]:
        return torch.autocast(device.type, torch.bfloat16, enabled=bf16)

    @torch.no_grad()
    def forward() -> Tensor:
        with autocast():
            return model(*inputs)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with autocast():
            loss = model(*inputs).float().square().mean()
        loss.backward()

    return forward, step


@torch.no_grad()
def _wake(model: nn.Module) -> None:
    """Give small values to parameters that are zero at the start (adaLN-zero).

    The branches of a trained model carry numbers; zeros would take another time.
    """
    for parameter in model.parameters():
        if not parameter.any():
            parameter.normal_(std=0.02)
