"""Tensors of a weight file, ours or someone else's. Nothing is unpickled but tensors and plain values."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mhla_lightning.errors import UserError

_INSIDE = ("ema", "state_dict", "model", "state_dict_ema")
"""Where a training checkpoint keeps its weights, the first one found; `ema` is the public DiT's average, which its own sampler takes."""


def read_tensors(path: Path, what: str) -> dict[str, Tensor]:
    """Tensors of a .safetensors or torch file by name, without what wrappers put before the names; of a training checkpoint its weights.

    Args:
        what: the key or argument that names the file, for the error.

    Raises:
        UserError: a file that is not plain tensors.
    """
    try:
        state = load_file(path) if path.suffix == ".safetensors" else _load(path)
    except UnpicklingError as error:  # torch's own words are a page of advice
        raise UserError(f"{what}: {path} holds no plain tensors (or more than tensors and plain values, which is never unpickled)") from error
    except (SafetensorError, RuntimeError, EOFError) as error:
        raise UserError(f"{what}: {path} holds no plain tensors ({str(error).splitlines()[0]})") from error
    if not isinstance(state, Mapping):
        raise UserError(f"{what}: {path} holds no plain tensors (a {type(state).__name__})")
    for key in _INSIDE:
        if isinstance(state.get(key), Mapping):
            state = state[key]
            break
    return {strip_wrappers(name): value for name, value in state.items() if isinstance(value, Tensor)}


def strip_wrappers(name: str) -> str:
    """Takes off what wrappers put before a backbone's names."""
    return re.sub(r"^((module|_orig_mod|backbone|model)\.)+", "", name)


def _load(path: Path) -> object:
    """The public DiT's training checkpoints also hold their command's arguments, a Namespace of plain values."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)
