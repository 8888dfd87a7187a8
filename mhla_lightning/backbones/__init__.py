"""The backbone registry.

Importing it also registers the image classifiers with timm (`deit_tiny_mhla`, ...): its one side effect.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, cast

import timm
import torch
from torch import Tensor, nn

from mhla_lightning.arguments.checked import check_arguments
from mhla_lightning.attention import ATTENTION
from mhla_lightning.backbones.adapting import Grid
from mhla_lightning.backbones.causal_lm import CausalLM, CausalLMOptions, ModelState
from mhla_lightning.backbones.convnet import ConvNet
from mhla_lightning.backbones.dit import DiT, DiTOptions
from mhla_lightning.backbones.sana import SanaDiT, SanaOptions
from mhla_lightning.backbones.timm_names import TimmFacts, register_classifiers
from mhla_lightning.backbones.video_dit import VideoDiT, VideoDiTOptions
from mhla_lightning.backbones.vit import VisionTransformer, ViTOptions
from mhla_lightning.backbones.vlt import VLT, VLTOptions
from mhla_lightning.errors import UserError, unknown_name
from mhla_lightning.plugins import load_plugins
from mhla_lightning.weights.adapted import Adapted, Geometry, ModelFacts, WeightState

__all__ = [
    "BACKBONES",
    "IMAGE_CLASSIFIERS",
    "IMAGE_DIFFUSION",
    "TEXT_TO_IMAGE",
    "TIMM_FACTS",
    "VIDEO_DIFFUSION",
    "VLT",
    "Backbone",
    "CausalLM",
    "CausalLMOptions",
    "DiT",
    "DiTOptions",
    "ModelState",
    "SanaDiT",
    "SanaOptions",
    "VLTOptions",
    "ViTOptions",
    "VideoDiT",
    "VideoDiTOptions",
    "VisionTransformer",
    "build_backbone",
    "default_options",
    "described_geometry",
    "known_geometry",
    "register_backbone",
    "timm_geometry",
]


class Backbone(Protocol):
    """What tasks ask of a backbone besides being a module."""

    grid: Sequence[int]

    def flops(self, shape: Sequence[int]) -> int: ...

    def no_weight_decay(self) -> set[str]: ...

    def adapt_state_dict(self, state: Mapping[str, Tensor], grid: Grid = None) -> Adapted: ...


@dataclass(frozen=True)
class Architecture:
    """A model class, and the options that one name of the registry begins with.

    Args:
        model: called with the attention entry and the options.
        options: a frozen dataclass, one field an option.
    """

    model: Callable[[Any, Any], nn.Module]
    options: Any

    def __call__(self, attention: Any = "mhla", **options: Any) -> nn.Module:
        return self.model(attention, replace(self.options, **options))


IMAGE_CLASSIFIERS: dict[str, Architecture] = {
    "deit_tiny": Architecture(VisionTransformer, ViTOptions(embed_dim=192, depth=12, num_heads=3)),
    "deit_small": Architecture(VisionTransformer, ViTOptions(embed_dim=384, depth=12, num_heads=6)),
    "deit_base": Architecture(VisionTransformer, ViTOptions(embed_dim=768, depth=12, num_heads=12)),
    "vlt_tiny": Architecture(VLT, VLTOptions()),
    "vlt_small": Architecture(
        VLT, VLTOptions(embed_dims=(64, 128, 320, 512), depths=(3, 5, 9, 3), num_heads=(1, 2, 5, 8))
    ),
    "vlt_base": Architecture(
        VLT,
        VLTOptions(
            embed_dims=(96, 192, 384, 512),
            depths=(4, 6, 12, 6),
            num_heads=(1, 2, 6, 8),
            layer_scale=(1.0, 1.0, 1e-6, 1e-6),
        ),
    ),
    "vlt_large": Architecture(
        VLT,
        VLTOptions(
            embed_dims=(96, 192, 448, 640),
            depths=(4, 7, 19, 8),
            num_heads=(1, 2, 7, 10),
            layer_scale=(1e-6, 1e-6, 1e-6, 1e-6),
        ),
    ),
}

_DIT_SIZES: dict[str, dict[str, Any]] = {
    "s": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "b": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "l": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "xl": {"embed_dim": 1152, "depth": 28, "num_heads": 16},
}

IMAGE_DIFFUSION: dict[str, Callable[..., nn.Module]] = {
    f"dit_{name}{patch}": Architecture(DiT, DiTOptions(patch_size=patch, **size))
    for name, size in _DIT_SIZES.items()
    for patch in (2, 4, 8)
}

_SANA_TINY = SanaOptions(
    patch_size=2,
    in_channels=3,
    embed_dim=128,
    depth=4,
    num_heads=4,
    cross_heads=2,
    text_dim=64,
    text_length=16,
)

TEXT_TO_IMAGE: dict[str, Callable[..., nn.Module]] = {
    "sana_600m": Architecture(SanaDiT, SanaOptions()),
    "sana_1600m": Architecture(SanaDiT, SanaOptions(embed_dim=2240, depth=20, num_heads=70, cross_heads=20)),
    "sana_tiny": Architecture(SanaDiT, _SANA_TINY),
}

_WAN_TINY = VideoDiTOptions(
    input_size=(16, 64, 64),
    patch_size=(2, 4, 4),
    in_channels=3,
    embed_dim=128,
    ffn_dim=384,
    depth=4,
    num_heads=2,
    freq_dim=64,
    text_dim=64,
    text_length=16,
    blocks=(2, 4, 4),
)

VIDEO_DIFFUSION: dict[str, Callable[..., nn.Module]] = {
    "wan_1_3b": Architecture(VideoDiT, VideoDiTOptions()),
    "wan_14b": Architecture(VideoDiT, VideoDiTOptions(embed_dim=5120, ffn_dim=13824, depth=40, num_heads=40)),
    "wan_tiny": Architecture(VideoDiT, _WAN_TINY),
}

BACKBONES: dict[str, Callable[..., nn.Module]] = {
    **IMAGE_CLASSIFIERS,
    **IMAGE_DIFFUSION,
    **TEXT_TO_IMAGE,
    **VIDEO_DIFFUSION,
    "convnet_tiny": ConvNet,
    "lm_340m": Architecture(CausalLM, CausalLMOptions(embed_dim=1024, depth=24)),
    "lm_tiny": Architecture(CausalLM, CausalLMOptions(vocab_size=257, context=256, embed_dim=128, depth=4)),
}


def register_backbone(name: str, builder: Callable[..., nn.Module]) -> None:
    """Add a backbone under a new name.

    Args:
        name: how recipes name it.
        builder: called with `attention` and the options as keywords: a class, a function, or an
            :class:`Architecture`.

    Raises:
        UserError: the name is taken.
    """
    if name in BACKBONES:
        raise UserError("name", f"backbone '{name}' is already registered")
    BACKBONES[name] = builder


def default_options(name: str) -> dict[str, Any]:
    """Return the options of a registered backbone with their defaults, without `attention`."""
    builder = BACKBONES[name]
    if isinstance(builder, Architecture):
        return {field.name: getattr(builder.options, field.name) for field in fields(builder.options)}
    parameters = inspect.signature(builder).parameters
    return {key: found.default for key, found in parameters.items() if key != "attention"}


def build_backbone(
    name: str, *, attention: str | Mapping[str, Any] | Sequence[Any] = "mhla", **options: Any
) -> nn.Module:
    """Build a backbone of the registry around an attention entry.

    Args:
        name: name in BACKBONES.
        attention: attention entry: name, mapping, or a list of these cycled over the layers.
        options: the backbone's own options; see :func:`default_options`.

    Raises:
        UserError: unknown backbone or option, or a size that does not fit. Keys are `name`, an option,
            or a key of the entry such as `attention.blocks`.
    """
    if name not in BACKBONES:
        load_plugins()  # one of them may register it
    if name not in BACKBONES:
        raise UserError("name", unknown_name("backbone", name, BACKBONES))
    valid = default_options(name)
    for key in options:
        if key not in valid:
            raise UserError(key, unknown_name("option", key, valid, of=f"backbone '{name}'"))
    if not isinstance(BACKBONES[name], Architecture):
        check_arguments(BACKBONES[name], options)
    return BACKBONES[name](attention=attention, **options)


def known_geometry(state: WeightState) -> Geometry | None:
    """Return the geometry of the model that weights come from; None where nothing tells it.

    Args:
        state: weights as they were read. Its own geometry takes precedence over a recipe or header, and these
            over timm's name for a model.
    """
    return state.geometry or described_geometry(state.facts) or timm_geometry(state)


def described_geometry(facts: ModelFacts | None) -> Geometry | None:
    """Return the geometry of the model that a recipe or header describes, if one does.

    It builds that model without weights. A strategy may split all that is built while it builds the task's
    model (ZeRO-3), so this must not run inside `configure_model`.

    Args:
        facts: what the files of the weights tell.
    """
    if facts is None or facts.backbone not in BACKBONES:
        return None
    try:
        with torch.device("meta"):
            model: Any = build_backbone(
                facts.backbone, attention=facts.attention, **cast(Any, dict(facts.options))
            )
    except (UserError, TypeError):  # of another version, or a file that only looks like ours
        return None
    return getattr(model, "geometry", None)


def timm_geometry(state: WeightState) -> Geometry | None:
    """Return the geometry of a model of timm, by its image size or the name of its file.

    Args:
        state: weights as they were read.
    """
    facts = state.facts
    if facts is None or facts.backbone in BACKBONES:
        return None
    image, patch = facts.image or _size_by_name(facts.timm), state.get("patch_embed.proj.weight")
    if image is None or patch is None or patch.dim() != 4:
        return None
    return Geometry((image[0] // patch.shape[2], image[1] // patch.shape[3]))


def _size_by_name(name: str) -> tuple[int, int] | None:
    """Return the image size of a model of timm, by its name or that of a file named after it."""
    architecture = re.split(r"[-.]", name.rpartition("/")[2])[0]
    if not timm.is_model(architecture):
        return None
    config = timm.models.get_pretrained_cfg(architecture)
    return None if config is None else cast(tuple[int, int], tuple(config.input_size[-2:]))


TIMM_FACTS: dict[Any, TimmFacts] = {
    VisionTransformer: TimmFacts("patch_embed.proj", "head", (-3, -2, -1)),
    VLT: TimmFacts("stem.0.conv", "head.fc", (0, 1, 2, 3)),
}
"""What timm asks of the image classifiers, by their class."""

register_classifiers(
    {name: TIMM_FACTS[made.model] for name, made in IMAGE_CLASSIFIERS.items()},
    ATTENTION,
    build_backbone,
    known_geometry,
)
