"""Forward and backward of whole backbones at several sizes, as cases of analysis.timing. A family says how a size becomes options and inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from mhla_lightning.analysis.memory import peak_bytes
from mhla_lightning.analysis.timing import Case
from mhla_lightning.attention import BlockGrid
from mhla_lightning.backbones import IMAGE_DIFFUSION, Backbone, DiT, build_backbone
from mhla_lightning.errors import UserError, unknown_name

VAE_STRIDE = 8  # pixels a side of one latent pixel of Stable Diffusion's VAE


@dataclass(frozen=True)
class Family:
    """Backbones that are measured alike.

    Attributes:
        options: pixels per side -> the backbone's options. Raises UserError for pixels that do not fit.
        inputs: (model, batch) -> arguments of its forward.
    """

    options: Callable[[int], dict[str, Any]]
    inputs: Callable[[Any, int], tuple[Tensor, ...]]


def _latent_options(pixels: int) -> dict[str, Any]:
    if pixels < VAE_STRIDE or pixels % VAE_STRIDE:
        near = max(1, round(pixels / VAE_STRIDE)) * VAE_STRIDE
        raise UserError(f"--res {pixels} is no multiple of {VAE_STRIDE}, the VAE's stride; use {near}")
    return {"input_size": pixels // VAE_STRIDE}


def _latent_inputs(model: DiT, batch: int) -> tuple[Tensor, ...]:
    latents = torch.randn(batch, model.in_channels, *model.input_size)
    return latents, torch.randint(1000, (batch,)), torch.randint(model.num_classes, (batch,))


LATENT_DIFFUSION = Family(_latent_options, _latent_inputs)
FAMILIES: dict[str, Family] = dict.fromkeys(IMAGE_DIFFUSION, LATENT_DIFFUSION)
"""Backbone -> family. A video family takes frames too: its `options` and `inputs` grow by them."""


def family_of(backbone: str) -> Family:
    """The family of a backbone; UserError for one that has none."""
    if backbone not in FAMILIES:
        raise UserError(unknown_name("backbone", backbone, FAMILIES, of="bench backbone"))
    return FAMILIES[backbone]


def token_grid(backbone: str, options: Mapping[str, Any]) -> tuple[int, ...]:
    """Tokens per axis of a backbone with these options, which is not built."""
    with torch.device("meta"):
        return tuple(cast(Backbone, build_backbone(backbone, attention="softmax", **{**options, "depth": 1})).grid)


def blocks_for(grid: tuple[int, ...]) -> int:
    """Blocks per axis, the same on every axis, so that M^2 <= N: the most that every axis takes, full ones if those are at least half as many."""
    tokens, axes = torch.Size(grid).numel(), len(grid)
    fitting = [count for count in range(1, min(grid) + 1) if count ** (2 * axes) <= tokens and _takes(grid, count)]
    full = [count for count in fitting if BlockGrid(grid, count).even]
    return full[-1] if 2 * full[-1] >= fitting[-1] else fitting[-1]


def _takes(grid: tuple[int, ...], count: int) -> bool:
    return all(-(-n // -(-n // count)) == count for n in grid)


def make_case(
    label: str, backbone: str, attention: Mapping[str, Any], options: Mapping[str, Any], batch: int, device: torch.device, *, bf16: bool = False
) -> Case:
    """A training step of a backbone, forward and backward, on random inputs; float32, or under bf16 autocast."""
    family = family_of(backbone)
    model = build_backbone(backbone, attention=attention, **options)
    _wake(model)
    inputs = tuple(x.to(device) for x in family.inputs(model, batch))
    model = model.to(device).train()
    facts = cast(Backbone, model)

    def autocast() -> AbstractContextManager[Any]:
        return torch.autocast(device.type, torch.bfloat16, enabled=bf16)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with autocast():
            loss = model(*inputs).float().square().mean()
        loss.backward()

    tokens = torch.Size(tuple(facts.grid)).numel()
    return Case(label, tokens, batch * facts.flops(facts.grid), None, step, peak_bytes=peak_bytes(step, device))


@torch.no_grad()
def _wake(model: nn.Module) -> None:
    """What starts at zero (adaLN-zero) gets small values: a trained model's branches carry numbers, not zeros."""
    for parameter in model.parameters():
        if not parameter.any():
            parameter.normal_(std=0.02)
