"""Random numbers that depend on a key alone. numpy only."""

from __future__ import annotations

import hashlib

import numpy as np


def philox(*key: int | str) -> np.random.Philox:
    """A bit generator for `key`. numpy promises that a bit generator's raw output never changes; it does not for the distributions on top."""
    name = "/".join(str(part) for part in key)
    return np.random.Philox(key=int.from_bytes(hashlib.blake2b(name.encode(), digest_size=16).digest()))


def generator(*key: int | str) -> np.random.Generator:
    """Distributions drawn from `philox(*key)`."""
    return np.random.Generator(philox(*key))
