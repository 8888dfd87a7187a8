"""Randomness belongs to the sample, not to the process (DESIGN: a step is the same function of the global batch however it is split)."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def sample_seed(seed: int, purpose: str, epoch: int, index: int) -> int:
    """63 bits that depend on all four arguments; the same on every machine."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{epoch}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@contextmanager
def sample_rng(seed: int, purpose: str, epoch: int, index: int) -> Iterator[None]:
    """Inside, python's, numpy's and torch's CPU generators start from the sample's seed; after, they stand where they stood."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002  (timm draws from numpy's global generator)
    value = sample_seed(seed, purpose, epoch, index)
    random.seed(value)
    np.random.seed(value % 2**32)  # noqa: NPY002
    torch.default_generator.manual_seed(value)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])
