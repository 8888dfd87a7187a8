"""The backbone registry. Importing this module registers the image classifiers with timm
(`deit_tiny_mhla`, ...): its one side effect.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, cast

import timm
from torch import Tensor, nn

from mhla_lightning.attention import ATTENTION
from mhla_lightning.backbones.causal_lm import CausalLM, ModelState
from mhla_lightning.backbones.convnet import ConvNet
from mhla_lightning.backbones.dit import DiT
from mhla_lightning.backbones.video_dit import VideoDiT
from mhla_lightning.backbones.vit import VisionTransformer
from mhla_lightning.errors import UserError, unknown_name

__all__ = [
    "BACKBONES",
    "IMAGE_CLASSIFIERS",
    "IMAGE_DIFFUSION",
    "VIDEO_DIFFUSION",
    "Backbone",
    "CausalLM",
    "DiT",
    "ModelState",
    "VideoDiT",
    "VisionTransformer",
    "build_backbone",
    "register_backbone",
]


class Backbone(Protocol):
    """What tasks ask of a backbone besides being a module."""

    grid: Sequence[int]

    def flops(self, shape: Sequence[int]) -> int: ...

    def no_weight_decay(self) -> set[str]: ...

    def adapt_state_dict(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]: ...


IMAGE_CLASSIFIERS: dict[str, Callable[..., nn.Module]] = {
    "deit_tiny": partial(VisionTransformer, embed_dim=192, depth=12, num_heads=3),
    "deit_small": partial(VisionTransformer, embed_dim=384, depth=12, num_heads=6),
    "deit_base": partial(VisionTransformer, embed_dim=768, depth=12, num_heads=12),
}

_DIT_SIZES: dict[str, dict[str, Any]] = {
    "s": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "b": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "l": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "xl": {"embed_dim": 1152, "depth": 28, "num_heads": 16},
}

IMAGE_DIFFUSION: dict[str, Callable[..., nn.Module]] = {
    f"dit_{name}{patch}": partial(DiT, patch_size=patch, **size)
    for name, size in _DIT_SIZES.items()
    for patch in (2, 4, 8)
}

_WAN_TINY: dict[str, Any] = {
    "input_size": (16, 64, 64),
    "patch_size": (2, 4, 4),
    "in_channels": 3,
    "embed_dim": 128,
    "ffn_dim": 384,
}

VIDEO_DIFFUSION: dict[str, Callable[..., nn.Module]] = {
    "wan_1_3b": VideoDiT,
    "wan_14b": partial(VideoDiT, embed_dim=5120, ffn_dim=13824, depth=40, num_heads=40),
    "wan_tiny": partial(
        VideoDiT,
        **_WAN_TINY,
        depth=4,
        num_heads=2,
        freq_dim=64,
        text_dim=64,
        text_length=16,
        blocks=(2, 4, 4),
    ),
}

BACKBONES: dict[str, Callable[..., nn.Module]] = {
    **IMAGE_CLASSIFIERS,
    **IMAGE_DIFFUSION,
    **VIDEO_DIFFUSION,
    "convnet_tiny": ConvNet,
    "lm_340m": partial(CausalLM, embed_dim=1024, depth=24),
    "lm_tiny": partial(CausalLM, vocab_size=257, context=256, embed_dim=128, depth=4),
}


def register_backbone(name: str, builder: Callable[..., nn.Module]) -> None:
    """Adds a backbone under a new name.

    Raises:
        UserError: the name is taken.
    """
    if name in BACKBONES:
        raise UserError(f"backbone '{name}' is already registered")
    BACKBONES[name] = builder


def build_backbone(
    name: str, *, attention: str | Mapping[str, Any] | Sequence[Any] = "mhla", **options: Any
) -> nn.Module:
    """Builds a backbone of the registry around an attention entry.

    Raises:
        UserError: unknown backbone or option (the sentence lists the valid ones), or a size that does not
            fit.
    """
    if name not in BACKBONES:
        raise UserError(unknown_name("backbone", name, BACKBONES))
    valid = inspect.signature(BACKBONES[name]).parameters
    for key in options:
        if key not in valid:
            raise UserError(
                unknown_name("option", key, [n for n in valid if n != "attention"], of=f"backbone '{name}'")
            )
    return BACKBONES[name](attention=attention, **options)


def _register_with_timm() -> None:
    """`<backbone>_<attention>` for timm.create_model, which passes our options on."""
    for backbone in IMAGE_CLASSIFIERS:
        for attention in ATTENTION:
            name = f"{backbone}_{attention}"
            if not timm.is_model(name):
                timm.models.register_model(_timm_entry(name, backbone, attention))


def _timm_entry(name: str, backbone: str, attention: str) -> Callable[..., nn.Module]:
    def entry(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Any = None,
        cache_dir: object = None,
        pretrained_model_args: object = None,
        **options: Any,
    ) -> nn.Module:
        facts = (
            timm.models.resolve_pretrained_cfg(name, pretrained_cfg, pretrained_cfg_overlay).to_dict()
            if pretrained_cfg
            else {}
        )
        if pretrained and not facts.get("file"):
            raise UserError(
                f"timm model '{name}' has no pretrained weights to download; load your own with "
                "init_from or load_state_dict"
            )
        model = cast(Any, build_backbone(backbone, **{"attention": attention, **options}))
        if facts:
            model.pretrained_cfg = model.default_cfg = (
                facts  # where timm.data.resolve_model_data_config looks
            )
        if pretrained:
            channels = model.patch_embed.proj.weight.shape[1]
            timm.models.load_pretrained(model, facts, model.num_classes, channels, filter_fn=_adapted)
        return model

    entry.__name__ = name
    return entry


def _adapted(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    return cast(Backbone, model).adapt_state_dict(state)


_register_with_timm()
