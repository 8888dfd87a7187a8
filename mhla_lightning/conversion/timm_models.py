"""The ViT of timm behind a checkpoint, found by its name, config.json or shapes."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import nn

from mhla_lightning.errors import UserError, unknown_name
from mhla_lightning.weights.adapted import WeightState
from mhla_lightning.weights.files import read_tensors

_MODULES = ("vision_transformer", "deit")
_ARGUMENTS = (
    *("img_size", "patch_size", "in_chans", "num_classes", "global_pool", "embed_dim", "depth", "num_heads"),
    *("mlp_ratio", "qkv_bias", "init_values", "class_token", "no_embed_class", "fc_norm"),
    *("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"),
)
"""Arguments of a config.json that are passed to timm; others may name files or run code."""
_ENDINGS = (".pth", ".pt", ".bin", ".ckpt", ".safetensors")
_UNKNOWN_PARTS = {
    "dist_token": "a distillation token; take the model without `distilled` in its name",
    "reg_token": "register tokens",
    "norm_pre.weight": "a norm before its blocks",
    "attn_pool.q.weight": "attention pooling",
    "patch_embed.backbone.stem.conv.weight": "a convolutional stem",
    "blocks.0.attn.q_norm.weight": "norms of its queries and keys",
    "blocks.0.mlp.fc1_g.weight": "a gated MLP",
}
"""Tensor -> what a ViT with it has, and ours has not."""
_HEAD_DIM = 64  # of every ViT and DeiT up to `large`


@dataclass(frozen=True)
class TimmModel:
    """A model of timm with its weights.

    Attributes:
        source: the name or path that was given, for errors.
        state: its tensors by timm's names.
        model: timm's own, in eval mode, with these weights.
        notes: what was taken for granted, in words.
        pixels: mean and std of the normalisation that it was trained with; empty where they are not known.
    """

    source: str
    state: WeightState
    model: TimmVisionTransformer
    notes: list[str] = field(default_factory=list)
    pixels: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


def open_timm(
    source: str, named: str | None = None, heads: int | None = None, weights: str | None = None
) -> TimmModel:
    """Open a ViT or DeiT of timm.

    Args:
        source: a file of weights, a folder of timm, or timm's name of a model, which timm downloads.
        named: timm's name of the model behind a file; None takes config.json, the file's name or the shapes.
        heads: attention heads, where only the shapes tell the model.
        weights: key of a training checkpoint that holds the weights; None takes an average where there is
            one.

    Raises:
        UserError: no such file or model, one of another kind, or tensors that are not those of the model.
    """
    path = Path(source)
    if not path.exists():
        if path.suffix in _ENDINGS:
            raise UserError("path", f"there is no file or folder {source}; a name of timm has no such ending")
        return _downloaded(source)
    state = read_tensors(path, "path", weights)
    for name, part in _UNKNOWN_PARTS.items():
        if name in state:
            raise UserError("path", f"{source} has {part}; our ViT has none, so it would compute otherwise")
    for name in ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight"):
        if name not in state:
            raise UserError("path", f"{source} is no ViT of timm: it has no {name}, but {_some(state)}")
    config = _config(path)
    architecture: str | None = named or config.get("architecture") or _by_file(path)
    notes: list[str] = []
    if architecture is None:
        options = _by_shapes(source, state, heads)
        model = _built(source, lambda: TimmVisionTransformer(**options))
        notes.append(
            f"nothing names its model: taken for a plain ViT with {options['num_heads']} heads; if it is "
            "another, give timm's name with `model`"
        )
    else:
        arguments = {**_told(state), **_arguments(source, config)}
        _demand_vit("model" if named else "path", source, architecture)
        model = _built(source, lambda: timm.create_model(architecture, pretrained=False, **arguments))
    pixels = _pixels(architecture, config)
    if not pixels:
        notes.append(
            "nothing tells how its images were normalised: set `data.augmentation.mean` and `std` to what it "
            "was trained with"
        )
    return TimmModel(source, state, _filled(source, model, state), notes, pixels)


def _downloaded(name: str) -> TimmModel:
    """Let timm download a model by its name."""
    _demand_vit("path", name, name)
    try:
        model = timm.create_model(name, pretrained=True).eval()
    except Exception as error:  # noqa: BLE001  of the network, the hub or timm, of any kind
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            "path", f"timm could not download {name} ({reason}); give the path of its weights instead"
        ) from error
    _demand_plain(name, model)
    state = WeightState(model.state_dict())
    for tensor, part in _UNKNOWN_PARTS.items():
        if tensor in state:
            raise UserError("path", f"{name} has {part}; our ViT has none, so it would compute otherwise")
    return TimmModel(name, state, cast(TimmVisionTransformer, model), pixels=_pixels(name, {}))


def _demand_vit(key: str, source: str, name: str) -> None:
    """Refuse a name that is not that of a ViT or DeiT of timm."""
    base = name.partition(".")[0]
    if timm.is_model(base) and timm.models.is_model_in_modules(base, _MODULES):
        return
    known = [model for module in _MODULES for model in timm.list_models(module=module)]
    if not timm.is_model(base) and source == name:
        reason = unknown_name("model of timm", name, known)
        raise UserError(key, f"{source} is no file and no folder here; {reason}")
    raise UserError(key, f"'{name}' is no ViT or DeiT of timm; {unknown_name('model', name, known)}")


def _demand_plain(source: str, model: nn.Module) -> None:
    if type(model) is not TimmVisionTransformer:
        kind = type(model).__name__
        raise UserError("path", f"{source} is timm's {kind}; only plain ViTs and DeiTs are converted")


def _config(path: Path) -> Mapping[str, Any]:
    """Return timm's config.json of a folder, or beside a file; empty where there is none."""
    folder = path if path.is_dir() else path.parent
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, Mapping) and isinstance(found.get("architecture"), str) else {}


def _by_file(path: Path) -> str | None:
    """Return the model of timm that a file or folder is named after."""
    name = re.split(r"[-.]", path.name)[0]
    return name if timm.is_model(name) else None


def _arguments(source: str, config: Mapping[str, Any]) -> dict[str, Any]:
    given = config.get("model_args") or {}
    if not isinstance(given, Mapping):
        raise UserError("path", f"config.json of {source}: its model_args are no mapping")
    for name in given:
        if name not in _ARGUMENTS:
            reason = unknown_name("argument", name, _ARGUMENTS, of="model_args")
            raise UserError("path", f"config.json of {source}: {reason}")
    return dict(given)


def _told(state: WeightState) -> dict[str, Any]:
    """Return what the shapes tell beside timm's name: classes, channels, image size."""
    patch, head = state["patch_embed.proj.weight"], state.get("head.weight")
    told: dict[str, Any] = {"num_classes": 0 if head is None else len(head), "in_chans": patch.shape[1]}
    side = _side(state)
    return told if side is None else {**told, "img_size": side * patch.shape[2]}


def _side(state: WeightState) -> int | None:
    """Return the tokens per axis of a square grid; None where the positions are of no such grid."""
    rows = state["pos_embed"].shape[1]
    sides = [math.isqrt(count) for count in (rows - ("cls_token" in state), rows)]
    return next((side for side, count in zip(sides, (rows - ("cls_token" in state), rows), strict=True)
                 if side**2 == count), None)  # fmt: skip


def _by_shapes(source: str, state: WeightState, heads: int | None) -> dict[str, Any]:
    """Return the arguments of timm's VisionTransformer that fit the shapes."""
    patch, hidden = state["patch_embed.proj.weight"], state["blocks.0.mlp.fc1.weight"]
    dim, side, has_class = patch.shape[0], _side(state), "cls_token" in state
    if heads is None and dim % _HEAD_DIM:
        raise UserError("heads", f"the shapes of {source} do not show them; give their number")
    if side is None:
        raise UserError("model", f"the positions of {source} are of no square image; give timm's name of it")
    normed = "fc_norm.weight" in state
    return {
        **_told(state),
        "patch_size": patch.shape[2],
        "embed_dim": dim,
        "depth": 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks.")),
        "num_heads": heads or dim // _HEAD_DIM,
        "mlp_ratio": len(hidden) / dim,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "init_values": 1.0 if "blocks.0.ls1.gamma" in state else None,
        "class_token": has_class,
        "no_embed_class": has_class and side**2 == state["pos_embed"].shape[1],
        "global_pool": "token" if has_class and not normed else "avg",
        "fc_norm": normed,
    }


def _built(source: str, build: Any) -> TimmVisionTransformer:
    """Build timm's model without weights."""
    try:
        with torch.device("meta"):
            model = build()
    except Exception as error:  # noqa: BLE001  timm asserts, and raises of any kind
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError("path", f"timm cannot build the model of {source} ({reason})") from error
    _demand_plain(source, model)
    return cast(TimmVisionTransformer, model)


def _filled(source: str, model: TimmVisionTransformer, state: WeightState) -> TimmVisionTransformer:
    """Give timm's model its weights; refuse tensors that are not exactly its own."""
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in state.items()}
    for name in sorted(own.keys() | given.keys()):
        if own.get(name) != given.get(name):
            found, wanted = (shapes.get(name, "no tensor") for shapes in (given, own))
            raise UserError(
                "path",
                f"{source} does not fit timm's model of this name or config.json: {name} is {found} there, "
                f"and {wanted} in timm; `model` names another",
            )
    model.load_state_dict({name: value.float() for name, value in state.items()}, assign=True)
    return model.eval()


def _pixels(name: str | None, config: Mapping[str, Any]) -> dict[str, tuple[float, ...]]:
    """Return mean and std of a model's training images, by config.json or timm's name."""
    cfg = None if name is None else timm.models.get_pretrained_cfg(name)
    for facts in (config.get("pretrained_cfg"), None if cfg is None else cfg.to_dict()):
        pixels = {
            name: tuple(facts[name])
            for name in ("mean", "std")
            if isinstance(facts, Mapping) and _are_numbers(facts.get(name))
        }
        if len(pixels) == 2:
            return pixels
    return {}


def _are_numbers(value: object) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == 3
        and all(isinstance(number, int | float) for number in value)
    )


def _some(state: WeightState) -> str:
    return ", ".join(list(state)[:3]) or "nothing"
