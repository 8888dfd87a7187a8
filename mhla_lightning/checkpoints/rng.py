"""A process's random generators as plain tensors (no pickle)."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from mhla_lightning.errors import DataError


def rng_state() -> dict[str, torch.Tensor]:
    """Return the states of the generators of Python, numpy and torch."""
    _, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002
    tensors = {
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor(math.nan if gauss is None else gauss, dtype=torch.float64),
        "numpy": torch.tensor([*map(int, keys), position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor(cached, dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    return tensors


def load_rng(path: Path) -> None:
    """Restore a :func:`rng_state` that was written to a file.

    Raises:
        DataError: a damaged file.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(str(path), f"the random generators' states are damaged ({error})") from error
    gauss = float(tensors["python_gauss"])
    random.setstate((3, tuple(tensors["python"].tolist()), None if math.isnan(gauss) else gauss))
    *keys, position, has_gauss = tensors["numpy"].tolist()
    state = ("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, float(tensors["numpy_gauss"]))
    np.random.set_state(state)  # noqa: NPY002
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
