"""Read the architecture of a Wan checkpoint from its tensors and config (SPEC 6.8).

This covers sizes, gate, convolution, hybrid pattern and blocks, for checkpoints of Wan2.1 and of the MHLA
authors' Wan.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from mhla_lightning.attention import BlockGrid
from mhla_lightning.backbones import VIDEO_DIFFUSION
from mhla_lightning.conversion.config_files import (
    CONFIG,
    check_backbone,
    check_reading,
    if_its_own,
    not_default,
    own_facts,
)
from mhla_lightning.errors import UserError
from mhla_lightning.weights.adapted import Geometry
from mhla_lightning.weights.target import Entry, ImportTarget, State, Wish
from mhla_lightning.weights.wan_names import RELEASE_LAYOUTS

FAMILY = "Wan2.1"
CLASSES = ("WanModel", "WanTransformer3DModel")
OPTIONAL = re.compile(r"^blocks\.\d+\.(attn\.(attention|gate|out_norm|lepe)|cross_attn\.mixing|cpe)\.")

_PUBLIC = {1536: ("wan_1_3b", 12), 5120: ("wan_14b", 40)}  # width -> name, heads
_MIXING = "attention.mixing.weight"
# pos_conv -> tensor of a layer, by the names of _layers
_CONVOLUTIONS = {"lepe": "lepe.conv.weight", "cpe": "cpe.depthwise.conv.weight"}
_NEEDED = (
    "patch_embedding.weight",
    "text_embedding.0.weight",
    "time_embedding.0.weight",
    "blocks.0.ffn.0.weight",
    "blocks.0.attn.qkv.weight",
    "head.head.weight",
)


def wan_target(state: State, wish: Wish) -> ImportTarget:
    """Choose the backbone of a checkpoint whose tensors have our names.

    Values of the request take precedence over those of the checkpoint.

    Raises:
        UserError: no text-to-video Wan, a backbone of another family, or heads or blocks that are unknown or
            contradict the checkpoint.
    """
    check_backbone("backbone", wish.backbone, FAMILY, VIDEO_DIFFUSION)
    for name in _NEEDED:
        if name not in state:
            raise UserError(
                wish.source,
                f"no checkpoint of Wan2.1: it has no {name} (by our names), but {', '.join(list(state)[:3])}",
            )
    layers = _layers(state, wish.source)
    wish = replace(wish, config=if_its_own(wish.config, state, len(layers), wish.source))
    own = own_facts(wish, FAMILY, VIDEO_DIFFUSION)
    _check_heads(state, wish)
    options = {**_options(state, wish, own, len(layers)), **wish.options}
    check_reading(state, options, wish.source)
    backbone = wish.backbone or own.get("backbone") or _public(state)[0]
    return ImportTarget(
        backbone, _attention(layers, wish, own), not_default(backbone, options), OPTIONAL, stray=False
    )


def wan_geometry(state: State, wish: Wish) -> Geometry | None:
    """Return the blocks of a checkpoint's mixing matrices, by tensors of our names.

    They are those that the user tells, or the published ones. None where neither is known.
    """
    blocks = {}
    for name, value in state.items():
        layout = wish.layout or RELEASE_LAYOUTS.get(value.shape[-1]) if name.endswith(_MIXING) else None
        if layout is not None:
            blocks[name] = BlockGrid(layout, block_size=1)
    return Geometry(blocks=blocks) if blocks and not wish.config.get(CONFIG) else None


def cycle(entries: Sequence[Entry]) -> Entry:
    """Return the shortest attention entry for these layers.

    It is one entry, or a list that repeats over the layers.
    """
    for length in range(1, len(entries)):
        if all(entry == entries[number % length] for number, entry in enumerate(entries)):
            return entries[0] if length == 1 else list(entries[:length])
    return list(entries) if len(entries) > 1 else entries[0]


def _attention(layers: Sequence[Mapping[str, Tensor]], wish: Wish, own: Mapping[str, Any]) -> Entry:
    """Return the requested attention entry, that of our own config.json, or that of the tensors.

    A requested layout replaces the blocks of the last two.
    """
    if wish.attention is not None:
        return _with_layout(wish.attention, wish.layout)
    if "attention" in own:
        attention = _with_layout(own["attention"], wish.layout, replaces=True)
        for number, layer in enumerate(layers):
            if wish.layout is not None and _MIXING in layer:
                _layout(layer[_MIXING].shape[-1], number, wish)
    else:
        attention = cycle([_entry(layer, number, wish) for number, layer in enumerate(layers)])
    if wish.layout is not None and not _names_mhla(attention):
        raise UserError(
            "layout",
            f"gives the blocks of MHLA layers, and {wish.source} has no such layers; name them in "
            "`attention`, such as mhla",
        )
    return attention


def _check_heads(state: State, wish: Wish) -> None:
    """Check the number of heads that was requested.

    Raises:
        UserError: it contradicts the norms, config.json, the width or the backbone's options.
    """
    if wish.heads is None:
        return
    told, dim = _told_heads(state, wish), len(state["patch_embedding.weight"])
    if told is not None and told[0] != wish.heads:
        raise UserError("heads", f"{wish.heads} contradicts {told[1]} {wish.source}, with {told[0]} heads")
    if dim % (2 * wish.heads):
        raise UserError(
            "heads", f"{wish.heads} heads of even size do not fit the {dim} channels of {wish.source}"
        )
    if wish.options.get("num_heads", wish.heads) != wish.heads:
        raise UserError(
            "heads",
            f"{wish.heads} contradicts `backbone_options`, with num_heads: {wish.options['num_heads']}; "
            "give one of the two",
        )


def _told_heads(state: State, wish: Wish) -> tuple[object, str] | None:
    """Return the heads that a norm per head or config.json shows, and their origin in words."""
    norm = next((len(value) for name, value in state.items() if name.endswith(".attn.out_norm.weight")), None)
    if norm is not None:
        return len(state["patch_embedding.weight"]) // norm, "the norms of"
    config = wish.config.get("num_heads", wish.config.get("num_attention_heads"))
    return None if config is None else (config, "the config.json of")


def _options(state: State, wish: Wish, own: Mapping[str, Any], depth: int) -> dict[str, Any]:
    """Return the sizes of the backbone.

    A backbone that the request names keeps its own sizes; weights of another size are refused later, when the
    tensors are compared.
    """
    if wish.backbone is not None:
        return {"num_heads": wish.heads} if wish.heads is not None else {}
    if "backbone_options" in own:
        return dict(own["backbone_options"])
    patch = state["patch_embedding.weight"]
    patch_size, channels = list(patch.shape[2:]), patch.shape[1]
    out_channels = len(state["head.head.weight"]) // math.prod(patch_size)
    if out_channels != channels:
        raise UserError(
            wish.source,
            f"this model takes {channels} channels and returns {out_channels}; only text-to-video models "
            "are supported",
        )
    sizes = {
        "patch_size": patch_size,
        "in_channels": channels,
        "embed_dim": len(patch),
        "ffn_dim": len(state["blocks.0.ffn.0.weight"]),
        "depth": depth,
        "num_heads": _heads(state, wish),
        "freq_dim": state["time_embedding.0.weight"].shape[1],
        "text_dim": state["text_embedding.0.weight"].shape[1],
    }
    return sizes | ({"text_length": wish.config["text_len"]} if "text_len" in wish.config else {})


def _heads(state: State, wish: Wish) -> int:
    """Return the number of heads.

    It is the requested number, or that of a norm per head, of config.json, or of the public model.

    Raises:
        UserError: none of them gives a number.
    """
    told = _told_heads(state, wish)
    heads = wish.heads or (_public(state)[1] if told is None else told[0])
    if not isinstance(heads, int):
        raise UserError("heads", f"{wish.source} does not show its number of attention heads; give it")
    return heads


def _public(state: State) -> tuple[str, int | None]:
    return _PUBLIC.get(len(state["patch_embedding.weight"]), ("wan_1_3b", None))


def _layers(state: State, source: str) -> list[dict[str, Tensor]]:
    """Return the self-attention tensors of every layer, and `cpe.*` of its block.

    Raises:
        UserError: a block is missing.
    """
    found: dict[int, dict[str, Tensor]] = {}
    for name, value in state.items():
        block = re.match(r"blocks\.(\d+)\.", name)
        if block:
            layer = found.setdefault(int(block[1]), {})
            if name.startswith(f"{block[0]}attn."):
                layer[name.removeprefix(f"{block[0]}attn.")] = value
            elif name.startswith(f"{block[0]}cpe."):
                layer[name.removeprefix(block[0])] = value
    missing = next((number for number in range(len(found)) if number not in found), None)
    if missing is not None:
        raise UserError(
            source, f"this checkpoint is incomplete: it has blocks.{max(found)} and no blocks.{missing}"
        )
    return [found[number] for number in range(len(found))]


def _entry(layer: Mapping[str, Tensor], number: int, wish: Wish) -> Entry:
    """Return the attention entry that a layer was trained with.

    Training leaves the mixing values free (SPEC V8).
    """
    mixing = layer.get(_MIXING)
    convolutions = (f"{kind}{layer[name].shape[-1]}" for kind, name in _CONVOLUTIONS.items() if name in layer)
    found: dict[str, Any] = {"qk_norm": "q_norm.weight" in layer, "qkv_bias": "qkv.bias" in layer}
    found |= {
        "gate": "gate.weight" in layer,
        "out_norm": "out_norm.weight" in layer,
        "pos_conv": next(convolutions, "none"),
    }
    if mixing is None:
        plain = {"qk_norm": True, "qkv_bias": True, "gate": False, "out_norm": False, "pos_conv": "none"}
        return "softmax" if found == plain else {"name": "softmax", **found}
    per_head = {"mix_per_head": True} if mixing.dim() == 3 else {}
    blocks = _layout(mixing.shape[-1], number, wish)
    return {"name": "mhla", "blocks": blocks, "normalizer": "none", "mix_clamp": None, **per_head, **found}


def _layout(blocks: int, number: int, wish: Wish) -> list[int]:
    """Return the blocks per axis: those requested, or the release's."""
    layout = wish.layout or RELEASE_LAYOUTS.get(blocks)
    if layout is None:
        hint = "7 3 5" if blocks == 105 else "T H W"
        raise UserError(
            "layout",
            f"{wish.source} mixes {blocks} blocks in layer {number}, which several layouts give; name "
            f"one, such as {hint}",
        )
    if math.prod(layout) != blocks:
        given = " x ".join(map(str, layout))
        raise UserError(
            "layout",
            f"{given} is {math.prod(layout)} blocks, and layer {number} of {wish.source} mixes {blocks}",
        )
    return list(layout)


def _with_layout(attention: Entry, layout: tuple[int, ...] | None, replaces: bool = False) -> Entry:
    """Set the blocks of the MHLA layers of an attention entry.

    Args:
        attention: the entry.
        layout: blocks per axis; None changes nothing.
        replaces: whether layers that name their blocks change too.
    """
    if layout is None:
        return attention
    if not isinstance(attention, (str, Mapping)):
        return [_with_layout(entry, layout, replaces) for entry in attention]
    given = {"name": attention} if isinstance(attention, str) else dict(attention)
    if not _names_mhla(attention) or (not replaces and ("blocks" in given or "block_size" in given)):
        return attention
    given.pop("block_size", None)  # `blocks` replaces it
    return {**given, "blocks": list(layout)}


def _names_mhla(attention: Entry) -> bool:
    if isinstance(attention, str):
        return attention == "mhla"
    if isinstance(attention, Mapping):
        return attention.get("name") == "mhla"
    return any(_names_mhla(entry) for entry in attention)
