"""Read the architecture of a SANA checkpoint from its tensors and config.

It covers diffusers' folders of SANA, and those that `mhla export` writes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mhla_lightning.backbones import TEXT_TO_IMAGE
from mhla_lightning.conversion.config_files import (
    check_backbone,
    check_reading,
    check_whole,
    if_its_own,
    not_default,
    own_facts,
)
from mhla_lightning.errors import UserError
from mhla_lightning.weights.sana_names import needed_by_sana
from mhla_lightning.weights.target import Entry, ImportTarget, State, Wish

FAMILY = "SANA"
CLASSES = ("SanaTransformer2DModel",)
OPTIONAL = re.compile(
    r"^blocks\.\d+\.(attn\.(attention|gate|out_norm|lepe|q_norm|k_norm)|cross_attn\.(mixing|norm_q|norm_k)"
    r"|cpe|ffn\.depthwise)\."
)

_PUBLIC = {1152: ("sana_600m", 36, 16), 2240: ("sana_1600m", 70, 20)}  # width -> name, heads, cross heads
# Sizes in config.json: that tell whether it is the model's own, and that may be absent.
_NEEDED = ("num_attention_heads", "attention_head_dim", "num_layers")
_GIVEN = ("num_cross_attention_heads", "sample_size")
# key of config.json -> (the value that we compute, what else it would be)
_FIXED: dict[str, tuple[Any, str]] = {
    "qk_norm": (None, "norms of q and k, as in SANA-1.5"),
    "guidance_embeds": (False, "an embedding of the guidance, as in SANA-Sprint"),
    "interpolation_scale": (None, "positions, as in SANA for 2048 pixels and more"),
    "timestep_scale": (1.0, "scaled times, as in SANA-Sprint"),
    "norm_elementwise_affine": (False, "norms with weights"),
    "norm_eps": (1e-6, "another epsilon of the norms"),
}


def sana_target(state: State, wish: Wish) -> ImportTarget:
    """Choose the backbone of a checkpoint whose tensors have our names.

    Values of the request take precedence over those of the checkpoint.

    Raises:
        UserError: no SANA, or one with parts that we lack. A backbone of another family. Heads that are
            unknown or contradict the checkpoint. A config.json whose sizes are missing or no sizes.
    """
    check_backbone("backbone", wish.backbone, FAMILY, TEXT_TO_IMAGE)
    depth = _depth(state, wish.source)
    if wish.config:
        check_whole(wish.config, _NEEDED, wish.source)
    wish = replace(wish, config=if_its_own(wish.config, state, depth, wish.source))
    check_whole(wish.config, [key for key in _GIVEN if wish.config.get(key) is not None], wish.source)
    for key, (value, part) in _FIXED.items():
        if wish.config.get(key, value) != value:
            raise UserError(
                f"config.json beside {wish.source}",
                f"{key} is {wish.config[key]}: this model has {part}, which no backbone here has",
            )
    own = own_facts(wish, FAMILY, TEXT_TO_IMAGE)
    options = {**_options(state, wish, own, depth), **wish.options}
    check_reading(state, options, wish.source)
    backbone = wish.backbone or own.get("backbone") or _public(state)[0]
    attention = _attention(state, wish, own)
    return ImportTarget(backbone, attention, not_default(backbone, options), OPTIONAL, stray=False)


def _depth(state: State, source: str) -> int:
    """Return the number of layers.

    Raises:
        UserError: the checkpoint is no SANA, or lacks tensors of it.
    """
    blocks = [int(found[1]) for name in state if (found := re.match(r"blocks\.(\d+)\.", name))]
    depth = max(blocks, default=0) + 1
    needed = needed_by_sana(depth, qkv_bias=False)
    missing = [name for name in needed if name not in state and not OPTIONAL.match(name)]
    if len(missing) > len(needed) / 2:
        some = ", ".join(list(state)[:3])
        raise UserError(source, f"no checkpoint of SANA: it has no {missing[0]} (by our names), but {some}")
    if missing:
        raise UserError(source, f"this checkpoint is incomplete: it has no {missing[0]} (by our names)")
    return depth


def _attention(state: State, wish: Wish, own: Mapping[str, Any]) -> Entry:
    """Return the requested attention entry, that of our own config.json, or SANA's.

    Raises:
        UserError: mixing matrices, and nothing that names their blocks.
    """
    if wish.attention is not None:
        return wish.attention
    if "attention" in own:
        return own["attention"]
    mixing = next((name for name in state if name.endswith(".attention.mixing.weight")), None)
    if mixing is not None:
        raise UserError(
            "attention",
            f"{wish.source} holds {mixing}, and no config.json of mhla export names its blocks; give the "
            "entry, such as '{name: mhla, blocks: 4}'",
        )
    bias = "blocks.0.attn.qkv.bias" in state
    return {"name": "linear", "qkv_bias": True} if bias else "linear"


def _options(state: State, wish: Wish, own: Mapping[str, Any], depth: int) -> dict[str, Any]:
    """Return the sizes of the backbone.

    A backbone that the request names keeps its own sizes; weights of another size are refused later, when the
    tensors are compared.

    Raises:
        UserError: heads that are unknown, or that contradict config.json; a model that returns other channels
            than it takes.
    """
    if wish.backbone is not None:
        return {"num_heads": wish.heads} if wish.heads is not None else {}
    if "backbone_options" in own:
        return dict(own["backbone_options"])
    patch = state["patch_embedding.weight"]
    dim, channels, *patch_size = patch.shape
    out_channels = len(state["head.head.weight"]) // (patch_size[0] * patch_size[1])
    if out_channels != channels:
        raise UserError(wish.source, f"this model takes {channels} channels and returns {out_channels}")
    hidden = len(state["blocks.0.ffn.inverted.weight"]) // 2
    size = wish.config.get("sample_size")
    return {
        **({} if size is None else {"input_size": size}),
        "patch_size": patch_size[0] if len(set(patch_size)) == 1 else patch_size,
        "in_channels": channels,
        "embed_dim": dim,
        "depth": depth,
        "num_heads": _heads(state, wish, "num_attention_heads"),
        "cross_heads": _heads(state, wish, "num_cross_attention_heads"),
        "mlp_ratio": ratio_of(hidden, dim),
        "ffn_conv": "blocks.0.ffn.depthwise.conv.weight" in state,
        "text_dim": state["text_embedding.0.weight"].shape[1],
    }


def _heads(state: State, wish: Wish, key: str) -> int:
    """Return a number of heads: that requested, of config.json, or of the public model.

    Args:
        state: the tensors.
        wish: the request.
        key: of config.json.

    Raises:
        UserError: none of them gives a number, or they contradict each other.
    """
    across = key == "num_cross_attention_heads"
    option = "cross_heads" if across else "num_heads"
    requested = None if across else wish.heads
    given = wish.options.get(option, requested)
    told = wish.config.get(key)
    if requested not in (None, given):
        raise UserError("heads", f"{requested} contradicts `backbone_options`, with {option}: {given}")
    if given is not None and told is not None and given != told:
        name = "heads" if option not in wish.options else f"backbone_options.{option}"
        raise UserError(name, f"{given} contradicts the config.json of {wish.source}, with {told} heads")
    found = given or told or _public(state)[2 if across else 1]
    if not isinstance(found, int):
        how = "give `backbone_options` with cross_heads" if across else "give it"
        raise UserError(
            "backbone_options.cross_heads" if across else "heads",
            f"{wish.source} does not show its number of {'cross-' if across else ''}attention heads; {how}",
        )
    return found


def ratio_of(hidden: int, dim: int) -> float:
    """Return the `mlp_ratio` of which int(mlp_ratio * dim) is `hidden`."""
    ratio = hidden / dim
    return ratio if int(ratio * dim) == hidden else math.nextafter(ratio, math.inf)


def _public(state: State) -> tuple[str, int | None, int | None]:
    return _PUBLIC.get(len(state["patch_embedding.weight"]), ("sana_600m", None, None))
