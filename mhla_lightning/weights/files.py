"""Tensors of a weight file or of a folder of them, ours or others'.

Only tensors and plain values are ever unpickled.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mhla_lightning.errors import UserError
from mhla_lightning.weights.adapted import WeightState, noted_geometry
from mhla_lightning.weights.facts import facts_of
from mhla_lightning.weights.rank_files import RankFileReader, holds_rank_files

_AVERAGES = ("ema", "state_dict_ema", "model_ema", "ema_state_dict", "model_ema_state_dict")
_INSIDE = (*_AVERAGES, "state_dict", "model", "model_state_dict", "module", "net", "params")
"""Keys under which a training checkpoint may keep its weights; the first one found is taken.

An average comes first, as for our own runs: the samplers and tests of others use it, too.
"""


def read_tensors(path: Path, key: str, choice: str | None = None) -> WeightState:
    """Return the tensors of a file or folder by name, without the prefixes of wrappers.

    Args:
        path: a .safetensors or torch file; a training checkpoint, of which the weights are taken; or a folder
            with one .safetensors file, with the files that one *.safetensors.index.json names, or with the
            rank files of a split run.
        key: the argument that names the path, for errors.
        choice: key of a training checkpoint under which its weights are; None takes an average where there is
            one.

    Returns:
        the tensors, and all that the files tell of their model.

    Raises:
        UserError: a file that is not plain tensors; a folder without weights, with several models, or with a
            missing file; a choice that is not there, or weights that need one.
    """
    if is_deepspeed(path):
        raise UserError(key, refusal(path))
    state = _tensors_of(path, key, choice)
    state.facts = facts_of(path)
    return state


def _tensors_of(path: Path, key: str, choice: str | None) -> WeightState:
    if not path.is_dir():
        return _read(path, key, choice)
    if choice is not None:
        raise UserError("weights", f"{path} holds one model, and no '{choice}' to choose; leave it out")
    if holds_rank_files(path):
        return WeightState(_named(RankFileReader(path).weights(), path, key))
    state = WeightState()
    for part in weight_files(path, key):
        for name, value in _read(part, key, None).items():
            if name in state:
                raise UserError(key, f"{path} holds {name} twice: in {part.name} and in another file")
            state[name] = value
    return state


def weight_files(folder: Path, key: str) -> list[Path]:
    """Return the .safetensors files of a folder that make up one model.

    It is a single file, or the files that an index names.

    Args:
        folder: the folder, or a diffusers pipeline that keeps the model in `transformer/`.
        key: the argument that names the folder, for errors.

    Raises:
        UserError: no file or several, an invalid index, or a file that is missing or in another folder.
    """
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if len(indices) == 1:
        return _indexed(indices[0], key)
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found
    if not found and (folder / "transformer").is_dir():  # a diffusers pipeline holds the model in a folder
        return weight_files(folder / "transformer", key)
    names = ", ".join(path.name for path in found[:4]) or "none"
    raise UserError(
        key,
        f"{folder} must hold one .safetensors file, or several and their *.safetensors.index.json; it holds "
        f"{names}",
    )


def _indexed(index: Path, key: str) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            key, f"{index} is no index of weights (a JSON file with a weight_map of names to files)"
        ) from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not (index.parent / name).is_file():
            raise UserError(key, f"{index} names {name!r}, and {index.parent} holds no such file")
    return [index.parent / name for name in names]


def _read(path: Path, key: str, choice: str | None) -> WeightState:
    try:
        state = load_file(path) if path.suffix == ".safetensors" else _load(path)
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(key, f"{path} holds no plain tensors ({reason})") from error
    except Exception as error:  # noqa: BLE001
        # torch's unpickler gives a page of advice, or over a file that is no pickle an error of any kind.
        raise UserError(
            key,
            f"{path} holds no plain tensors, or also holds objects other than tensors and plain values, "
            "which are never unpickled",
        ) from error
    if not isinstance(state, Mapping):
        raise UserError(key, f"{path} holds no plain tensors (a {type(state).__name__})")
    taken, others = _chosen(state, path, key, choice)
    if taken is not None:
        state = state[taken]
    words = f"the weights under '{taken}'" if taken is not None else ""
    if others:
        words += f", not {' or '.join(map(repr, others))} (`weights` chooses)"
    return WeightState(_named(state, path, key), noted_geometry(state), taken=words)


def _chosen(
    state: Mapping[str, Any], path: Path, key: str, choice: str | None
) -> tuple[str | None, list[str]]:
    """Return the key of the weights in a training checkpoint, and those of other weights.

    The key is None where the file holds bare weights.

    Raises:
        UserError: a choice that is not there, or weights under keys of which none comes first.
    """
    found = [name for name, value in state.items() if _holds_weights(value)]
    bare = any(isinstance(value, Tensor) and value.dim() for value in state.values())
    if choice is not None:
        if choice not in found:
            there = ", ".join(found) or "one model"
            raise UserError("weights", f"{path} holds no weights under '{choice}'; it holds {there}")
        return choice, [name for name in found if name != choice]
    taken = next((name for name in _INSIDE if name in found), None)
    if taken is None and not bare and len(found) > 1:
        raise UserError(
            key,
            f"{path} holds several models, {', '.join(found)}; name one with `weights`, such as {found[0]}",
        )
    if taken is None and not bare and found:
        taken = found[0]
    return taken, [name for name in found if name != taken]


def _holds_weights(value: object) -> bool:
    """Return whether a value of a checkpoint maps names to weights."""
    return isinstance(value, Mapping) and any(
        isinstance(name, str) and isinstance(tensor, Tensor) and tensor.dim()
        for name, tensor in value.items()
    )


def _named(state: Mapping[str, object], path: Path, key: str) -> dict[str, Tensor]:
    """Return the tensors among the values, by names without wrappers."""
    tensors: dict[str, Tensor] = {}
    for given, value in state.items():
        name = strip_wrappers(given)
        if not isinstance(value, Tensor):
            continue
        if name in tensors:
            raise UserError(key, f"{path} holds {name} twice; the second is called {given}")
        tensors[name] = value
    return tensors


def is_deepspeed(path: Path) -> bool:
    """Return whether a folder is a checkpoint that DeepSpeed itself wrote (ours are not).

    Such a folder holds `latest`, and pickles in the folder that it names.
    """
    return (path / "latest").is_file() and any(path.glob("*/*_states.pt"))


def refusal(path: Path) -> str:
    """Return why a checkpoint of DeepSpeed's is not read, and what to do."""
    return (
        f"{path} is a checkpoint that DeepSpeed itself wrote, and its pickles can run any code; if you trust "
        f"its author, `mhla export {path} --to weights.safetensors --trust-checkpoint` makes a plain file of "
        "it"
    )


def strip_wrappers(name: str) -> str:
    """Return a backbone's name of a parameter without the prefixes that wrappers add."""
    name = re.sub(r"(^|\.)((_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+", r"\1", name)
    return re.sub(r"^((module|backbone|model)\.)+", "", name)


def _load(path: Path) -> object:
    """Return what a torch file holds.

    The public DiT's training checkpoints also hold their command's arguments, a Namespace of plain values.
    """
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)
