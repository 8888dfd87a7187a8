"""ViTs and DeiTs of timm as our VisionTransformer, with softmax or another attention.

What ours lacks is computed into its weights. Scales of residual branches (LayerScale) go into the layers
before them. A class token without a position gets one of zeros. The class token stays where every operator
takes it, and is left over where tokens need a place on the grid.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from mhla_lightning.backbones import IMAGE_CLASSIFIERS, VisionTransformer, build_backbone, default_options
from mhla_lightning.backbones.vit import takes_class_token
from mhla_lightning.conversion.foreign import Imported, convert
from mhla_lightning.conversion.timm_models import TimmModel
from mhla_lightning.errors import UserError
from mhla_lightning.weights.adapted import Geometry
from mhla_lightning.weights.target import ImportTarget, State, Wish

_VITS = [name for name, made in IMAGE_CLASSIFIERS.items() if made.model is VisionTransformer]
_NOTHING = re.compile(r"(?!)")
_SCALES = {"ls1.gamma": "attn.proj", "ls2.gamma": "mlp.fc2"}
"""Scale of a residual branch -> the layer before it."""
_NEW = r"\.(attn\.(attention|lepe|gate|norm|q_norm|k_norm|out_norm)|cpe)\.|\.attn\.qkv\.bias$"
_TOLERANCE = 1e-4  # of the largest number; float32 in another order of additions stays far below
_SIZES = ("embed_dim", "depth", "num_heads")


def convert_timm(opened: TimmModel, wish: Wish, seed: int = 0) -> tuple[Imported, ImportTarget]:
    """Convert a model of timm whose softmax form has timm's numbers on a random image.

    Args:
        opened: the model.
        wish: backbone, attention and options that take precedence.
        seed: of new weights.

    Raises:
        UserError: a backbone of another family, a model that ours cannot be, or options that do not fit.
    """
    if wish.backbone is not None and wish.backbone not in _VITS:
        raise UserError(
            "backbone",
            f"{wish.backbone} takes no weights of a ViT; valid: {', '.join(_VITS)}",
        )
    state, folded = _folded(opened)
    geometry = Geometry(tuple(opened.model.patch_embed.grid_size))
    twin = _target(opened, Wish(wish.source))
    imported = convert(state, twin, seed, opened.source, geometry)
    difference = _compared(opened, twin, imported)
    target = _target(opened, wish)
    if target != twin:
        imported = convert(state, target, seed, opened.source, geometry)
        difference += " as softmax"
    left = [name for name, _ in imported.left]
    if "cls_token" in left:
        imported.notes.append(
            "the class token is left over: these operators place every token on the grid, so the model "
            "classifies the average of all tokens"
        )
    imported.notes = [*opened.notes, *folded, difference, *imported.notes]
    return imported, target


def _target(opened: TimmModel, wish: Wish) -> ImportTarget:
    """Return the backbone: that of the wish, or the one with timm's numbers."""
    model = opened.model
    bias = cast(Any, model.blocks[0]).attn.qkv.bias is not None
    attention = _with_bias("softmax" if wish.attention is None else wish.attention, bias)
    depth, has_class = len(model.blocks), bool(model.has_class_token)
    keeps = has_class and wish.options.get("class_token", True) and takes_class_token(attention, depth)
    first, patch = cast(Any, model.blocks[0]), model.patch_embed
    options: dict[str, Any] = {
        "img_size": _sides(patch.img_size),
        "patch_size": patch.patch_size[0],
        "token_multiple": 1,
        "in_chans": patch.proj.in_channels,
        "num_classes": model.num_classes or default_options("deit_tiny")["num_classes"],
        "embed_dim": model.embed_dim,
        "depth": depth,
        "num_heads": first.attn.num_heads,
        "mlp_ratio": first.mlp.fc1.out_features / model.embed_dim,
        "class_token": keeps,
        "global_pool": model.global_pool if keeps or not has_class or model.global_pool != "token" else "avg",
    }
    normed, pooled = isinstance(model.norm, nn.Identity), options["global_pool"] in ("avg", "max", "avgmax")
    options["fc_norm"] = None if normed == pooled else normed
    options |= wish.options
    name = wish.backbone or _nearest(options)
    known = default_options(name)
    left_out = {key: value for key, value in options.items() if known.get(key, value) != value}
    optional = [] if wish.attention is None else [_NEW]
    optional += [] if keeps == has_class else ["^cls_token$"]
    optional += [] if model.num_classes else ["^head\\."]
    pattern = re.compile("|".join(optional)) if optional else _NOTHING
    return ImportTarget(name, attention, {**left_out, **wish.options}, pattern, stray=False)


def _with_bias(entry: Any, bias: bool) -> Any:
    """Return an entry whose q, k and v have biases as in timm, unless it says otherwise."""
    if isinstance(entry, Sequence) and not isinstance(entry, str):
        return [_with_bias(one, bias) for one in entry]
    given = {"name": entry} if isinstance(entry, str) else dict(entry)
    if given.get("name") == "softmax" and bias:
        return entry
    return {**given, "qkv_bias": given.get("qkv_bias", bias)}


def _nearest(options: Mapping[str, Any]) -> str:
    """Return the name in the registry that leaves the fewest sizes to be written."""

    def differing(name: str) -> int:
        return sum(default_options(name)[size] != options[size] for size in _SIZES)

    return min(_VITS, key=differing)


def _sides(size: Sequence[int]) -> int | list[int]:
    return size[0] if size[0] == size[1] else list(size)


def _folded(opened: TimmModel) -> tuple[State, list[str]]:
    """Return the tensors without what ours lacks, and notes on what became of it."""
    state, notes = {name: value.float() for name, value in opened.state.items()}, []
    scales = [name for name in state if name.endswith(tuple(_SCALES))]
    for name in scales:
        block, scale = name.rsplit(".", 2)[0], state.pop(name)
        layer = f"{block}.{_SCALES[name.removeprefix(f'{block}.')]}"
        state[f"{layer}.weight"] = state[f"{layer}.weight"] * scale[:, None]
        if f"{layer}.bias" in state:
            state[f"{layer}.bias"] = state[f"{layer}.bias"] * scale
    if scales:
        notes.append(f"{len(scales)} scales of residual branches are multiplied into the layers before them")
    if opened.model.has_class_token and opened.model.no_embed_class:
        table = state["pos_embed"]
        state["pos_embed"] = torch.cat([torch.zeros_like(table[:, :1]), table], dim=1)
        notes.append("its class token has no position; here it has one of zeros")
    return state, notes


def _compared(opened: TimmModel, target: ImportTarget, imported: Imported) -> str:
    """Compare both models on a random image; return the difference in words.

    Raises:
        UserError: they compute different numbers, by an activation or a norm that no tensor shows.
    """
    with torch.device("meta"):
        ours = build_backbone(target.backbone, attention=target.attention, **target.options)
    ours.load_state_dict(imported.weights, assign=True)
    patch = opened.model.patch_embed
    size = (1, patch.proj.in_channels, *cast(Any, patch.img_size))
    image = torch.randn(size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        theirs, mine = (_outputs(model, image) for model in (opened.model, ours.eval()))
    if not opened.model.num_classes:
        theirs, mine = theirs[:1], mine[:1]
    worst = max(float((a - b).abs().max()) for a, b in zip(theirs, mine, strict=True))
    scale = max(1.0, *(float(a.abs().max()) for a in theirs))
    if not worst <= _TOLERANCE * scale:
        raise UserError(
            "path",
            f"{opened.source} computes other numbers in timm than its weights do here (by {worst:.3g}): its "
            "activation or norm is another; only ViTs and DeiTs with GELU and LayerNorm are converted",
        )
    return f"on a random image its logits differ from timm's by at most {worst:.1e}"


def _outputs(model: Any, image: torch.Tensor) -> list[torch.Tensor]:
    """Return features before the head, and logits."""
    features = model.forward_head(model.forward_features(image), pre_logits=True)
    return [features, model(image)]
