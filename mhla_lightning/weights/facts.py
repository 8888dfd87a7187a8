"""What the files beside weights tell of their model: a header, config.json or recipe.yaml."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open

from mhla_lightning.attention import ATTENTION
from mhla_lightning.runs.folder import read_json
from mhla_lightning.weights.adapted import ModelFacts

_INNER = ("ema", "shards", "transformer")
"""Folders of weights whose model is told in the folder around them."""
PIXELS = "pixels"
"""Key of a file's header: mean and std of the images that its weights were trained on, as JSON."""


def facts_of(path: Path) -> ModelFacts:
    """Return what is told of the model behind a file or folder of weights.

    Args:
        path: a file of weights, or the folder of several.
    """
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))[:1]
    folder = path if path.is_dir() else path.parent
    folders = [folder, folder.parent] if folder.name in _INNER else [folder]
    found = [_header(file) for file in files]
    for place in folders:
        found += [_recipe(place), _config(place)]
    name = path.stem if path.is_file() and path.stem not in ("model", "pytorch_model") else folder.name
    return next((facts for facts in found if facts is not None), ModelFacts(timm=name))


def _header(file: Path) -> ModelFacts | None:
    """Read the header of a file of `mhla import` or `mhla export`."""
    if file.suffix != ".safetensors":
        return None
    try:
        with safe_open(file, "pt") as opened:
            header = opened.metadata() or {}
        return _ours(
            {
                "backbone": header["backbone"],
                "attention": json.loads(header["attention"]),
                "backbone_options": json.loads(header["backbone_options"]),
            },
            json.loads(header.get(PIXELS, "{}")),
        )
    except (KeyError, ValueError, OSError, SafetensorError):
        return None


def _recipe(folder: Path) -> ModelFacts | None:
    """Read the recipe of a checkpoint folder. A recipe elsewhere may belong to other weights."""
    if not (folder / "COMPLETE").is_file():
        return None
    try:
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
        data = (recipe.get("data") or {}).get("init_args") or {}
        return _ours(recipe["model"]["init_args"], data.get("augmentation"))
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return None


def _config(folder: Path) -> ModelFacts | None:
    """Read config.json of an export of ours or of a model of timm."""
    config = read_json(folder / "config.json")
    if not isinstance(config, Mapping):
        return None
    for told in (config, config.get("_mhla_lightning")):
        if isinstance(told, Mapping) and "backbone" in told:
            return _ours(told)
    if config.get("model_type") == "mhla_language":
        options = {"context": config.get("context", 2048), "embed_dim": config.get("embed_dim", 1024)}
        options["depth"] = config.get("depth", 24)
        return ModelFacts("lm_340m", config.get("attention", "mhla"), options)
    name = str(config.get("architecture", ""))
    arguments = config.get("model_args")
    backbone, _, operator = name.rpartition("_")
    if isinstance(arguments, Mapping) and ("attention" in arguments or operator in ATTENTION):
        options = {key: value for key, value in arguments.items() if key != "attention"}
        entry = arguments.get("attention", operator)
        mean, std = _pixels(config.get("pretrained_cfg"))
        return ModelFacts(backbone, entry, options, mean=mean, std=std)
    size = (config.get("pretrained_cfg") or {}).get("input_size")
    size = arguments.get("img_size", size) if isinstance(arguments, Mapping) else size
    mean, std = _pixels(config.get("pretrained_cfg"))
    return ModelFacts(image=_sides(size), timm=name, mean=mean, std=std) if name else None


def _pixels(told: object) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and std where both are told, three numbers each; else two empty tuples."""
    given = told if isinstance(told, Mapping) else {}
    found = {
        name: tuple(map(float, given[name]))
        for name in ("mean", "std")
        if isinstance(given.get(name), list | tuple)
        and len(given[name]) == 3
        and all(isinstance(number, int | float) for number in given[name])
    }
    return (found["mean"], found["std"]) if len(found) == 2 else ((), ())


def _ours(told: Mapping[str, Any], pixels: object = None) -> ModelFacts | None:
    options = told.get("backbone_options") or {}
    if not isinstance(told["backbone"], str) or not isinstance(options, Mapping):
        return None
    mean, std = _pixels(pixels)
    return ModelFacts(told["backbone"], told.get("attention", "mhla"), options, mean=mean, std=std)


def _sides(size: object) -> tuple[int, int] | None:
    """Return (height, width) of a size of timm.

    It is a number, (height, width) or (channels, height, width).
    """
    sides = [size, size] if isinstance(size, int) else list(size) if isinstance(size, (list, tuple)) else []
    if len(sides) < 2 or not all(isinstance(side, int) for side in sides):
        return None
    return sides[-2], sides[-1]
