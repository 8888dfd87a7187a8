"""The config.json beside a diffusion model of others, and our facts in it."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from mhla_lightning.backbones import BACKBONES, default_options
from mhla_lightning.errors import UserError
from mhla_lightning.weights.target import State, Wish

CONFIG = "_mhla_lightning"
"""Key of our facts in an exported config.json; diffusers ignores keys that begin with an underscore."""
_SIZES = ("dim", "num_heads", "num_attention_heads", "attention_head_dim", "num_layers")
_MOST = 2**20  # more than any such size


def read_config(path: Path, classes: Collection[str]) -> dict[str, Any]:
    """Read the config.json beside a checkpoint; empty if there is none of these classes.

    Args:
        path: the checkpoint, a file or a folder.
        classes: values of `_class_name`.
    """
    folders = (path, path / "transformer") if path.is_dir() else (path.parent,)
    for folder in folders:
        try:
            found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(found, dict) and found.get("_class_name") in classes:
            return found
    return {}


def if_its_own(config: Mapping[str, Any], state: State, depth: int, source: str) -> Mapping[str, Any]:
    """Return the config, or an empty one if its width or depth belongs to another model.

    Args:
        config: of config.json.
        state: the tensors, by our names.
        depth: layers of the state.
        source: of the tensors, for messages.

    Raises:
        UserError: a size that is no whole number.
    """
    check_whole(config, [key for key in _SIZES if key in config], source)
    width = config.get("dim", config.get("num_attention_heads", 0) * config.get("attention_head_dim", 0))
    its_own = (width, config.get("num_layers")) == (len(state["patch_embedding.weight"]), depth)
    return config if its_own else {}


def check_whole(config: Mapping[str, Any], keys: Collection[str], source: str) -> None:
    """Refuse sizes that a config.json lacks, or that are no whole numbers from 1 on.

    Args:
        config: of config.json.
        keys: of the sizes.
        source: of the tensors beside it, for messages.

    Raises:
        UserError: names the first such key.
    """
    for key in keys:
        value = config.get(key)
        if type(value) is not int or not 1 <= value <= _MOST:
            found = f"is {value!r}" if key in config else "is missing"
            raise UserError(
                f"config.json beside {source}", f"{key} {found}; it must be a whole number from 1 to {_MOST}"
            )


def own_facts(wish: Wish, family: str, names: Collection[str]) -> Mapping[str, Any]:
    """Return what `mhla export` has written of the model into config.json; empty if nothing.

    Args:
        wish: the request.
        family: whose weights the backbones take, in words.
        names: of these backbones.

    Raises:
        UserError: anything else under our key, or a backbone of another family.
    """
    own = wish.config.get(CONFIG, {})
    kinds: dict[str, Any] = {"backbone": str, "attention": (str, dict, list), "backbone_options": dict}
    beside = f"config.json beside {wish.source}"
    if not isinstance(own, Mapping) or any(
        key in own and not isinstance(own[key], kind) for key, kind in kinds.items()
    ):
        raise UserError(beside, f"the value of {CONFIG} is not one that mhla export writes; remove it")
    check_backbone(beside, own.get("backbone"), family, names)
    return own


def check_backbone(key: str, backbone: str | None, family: str, names: Collection[str]) -> None:
    """Refuse a backbone that takes no weights of a family. Raises UserError."""
    if backbone is not None and backbone not in names:
        raise UserError(
            key, f"the backbone {backbone} takes no weights of {family}; valid: {', '.join(names)}"
        )


def not_default(backbone: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Drop options that equal the defaults of the registered backbone."""
    defaults = default_options(backbone) if backbone in BACKBONES else {}
    return {
        key: value for key, value in options.items() if key not in defaults or not _same(defaults[key], value)
    }


def _same(a: object, b: object) -> bool:
    return (tuple(a) if isinstance(a, list) else a) == (tuple(b) if isinstance(b, list) else b)


def check_reading(state: State, options: Mapping[str, Any], source: str) -> None:
    """Refuse a checkpoint whose text MHLA reads, where nothing tells its blocks.

    Args:
        state: the tensors by our names.
        options: of the backbone.
        source: the checkpoint's path.

    Raises:
        UserError: such a checkpoint.
    """
    mixing = next((name for name in state if name.endswith(".cross_attn.mixing.weight")), None)
    if mixing is not None and "cross_attention" not in options:
        raise UserError(
            "backbone_options.cross_attention",
            f"{source} holds {mixing}, and nothing names its blocks; give the entry, such as "
            "{name: mhla, blocks: 4}",
        )
