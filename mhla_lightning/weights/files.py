"""Tensors of a weight file, or of a folder of them, ours or someone else's. Nothing is unpickled but
tensors and plain values.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mhla_lightning.errors import UserError
from mhla_lightning.weights.rank_files import ShardReader, holds_shards

_INSIDE = ("ema", "state_dict", "model", "state_dict_ema")
"""Where a training checkpoint keeps its weights, the first one found; `ema` is the public DiT's average,
which its own sampler takes.
"""


def read_tensors(path: Path, what: str) -> dict[str, Tensor]:
    """Tensors of a .safetensors or torch file by name, without what wrappers put before the names; of a
    training checkpoint its weights.

    Args:
        path: a file, or a folder with one .safetensors file, with the parts that one *.safetensors.index.json
            names, or with what the ranks of a sharded run wrote.
        what: the key or argument that names the file, for the error.

    Raises:
        UserError: a file that is not plain tensors; a folder without weights, with several, or with a part
            missing.
    """
    if is_deepspeed(path):
        raise UserError(f"{what}: {refusal(path)}")
    if not path.is_dir():
        return _read(path, what)
    if holds_shards(path):
        return _named(ShardReader(path).weights(), path, what)
    state: dict[str, Tensor] = {}
    for part in weight_files(path, what):
        for name, value in _read(part, what).items():
            if name in state:
                raise UserError(f"{what}: {name} stands in {part} and in another part of {path}")
            state[name] = value
    return state


def weight_files(folder: Path, what: str) -> list[Path]:
    """The .safetensors files of a folder that make up one model: a single one, or those that an index names.

    Args:
        what: the key or argument that names the folder, for the error.

    Raises:
        UserError: none, several, an index that is none, or a part that is missing or lies elsewhere.
    """
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if len(indices) == 1:
        return _indexed(indices[0], what)
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found
    if not found and (folder / "transformer").is_dir():  # a diffusers pipeline: the model is one of its parts
        return weight_files(folder / "transformer", what)
    names = ", ".join(path.name for path in found[:4]) or "none"
    raise UserError(
        f"{what}: {folder} must hold one .safetensors file, or several and their "
        f"*.safetensors.index.json; it holds {names}"
    )


def _indexed(index: Path, what: str) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{what}: {index} is no index of weights (a JSON file with a weight_map of names to files)"
        ) from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not (index.parent / name).is_file():
            raise UserError(f"{what}: {index} names {name!r}, and {index.parent} holds no such file")
    return [index.parent / name for name in names]


def _read(path: Path, what: str) -> dict[str, Tensor]:
    try:
        state = load_file(path) if path.suffix == ".safetensors" else _load(path)
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{what}: {path} holds no plain tensors ({reason})") from error
    except Exception as error:  # noqa: BLE001
        # of torch's unpickler: a page of advice, or, over a file that is no pickle, an error of any kind
        raise UserError(
            f"{what}: {path} holds no plain tensors (or more than tensors and plain values, which is "
            "never unpickled)"
        ) from error
    if not isinstance(state, Mapping):
        raise UserError(f"{what}: {path} holds no plain tensors (a {type(state).__name__})")
    for key in _INSIDE:
        if isinstance(state.get(key), Mapping):
            state = state[key]
            break
    return _named(state, path, what)


def _named(state: Mapping[str, object], path: Path, what: str) -> dict[str, Tensor]:
    """The tensors among the values, by names without wrappers."""
    tensors: dict[str, Tensor] = {}
    for given, value in state.items():
        name = strip_wrappers(given)
        if not isinstance(value, Tensor):
            continue
        if name in tensors:
            raise UserError(f"{what}: {path} holds {name} twice; the second is called {given}")
        tensors[name] = value
    return tensors


def is_deepspeed(path: Path) -> bool:
    """Whether a folder is a checkpoint as DeepSpeed itself writes it (ours are not): `latest`, and files
    of pickles in the folder that it names.
    """
    return (path / "latest").is_file() and any(path.glob("*/*_states.pt"))


def refusal(path: Path) -> str:
    """Why a checkpoint of DeepSpeed's is not read, and what to do."""
    return (
        f"{path} is a checkpoint of DeepSpeed's own, whose pickles can run any code; if you trust "
        "who wrote it,"
        f" `mhla export {path} --to weights.safetensors --trust-checkpoint` makes a plain file of it"
    )


def strip_wrappers(name: str) -> str:
    """Takes off what wrappers put before a backbone's names."""
    return re.sub(r"^((module|_orig_mod|backbone|model)\.)+", "", name)


def _load(path: Path) -> object:
    """The public DiT's training checkpoints also hold their command's arguments, a Namespace of plain
    values.
    """
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)
