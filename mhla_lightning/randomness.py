"""Randomness belongs to the sample, not to the process: a step is the same function of the global batch
however it is split.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np


def philox(*key: int | str) -> np.random.Philox:
    """A bit generator for `key`. numpy promises that a bit generator's raw output never changes; it does
    not for the distributions on top.
    """
    name = "/".join(str(part) for part in key)
    return np.random.Philox(key=int.from_bytes(hashlib.blake2b(name.encode(), digest_size=16).digest()))


def generator(*key: int | str) -> np.random.Generator:
    """Distributions drawn from `philox(*key)`."""
    return np.random.Generator(philox(*key))


def run_seed() -> int:
    """The run's seed: what seed_everything left in the environment, else that of torch's generator."""
    import torch  # here: workers and the data commands draw with numpy alone

    return int(os.environ.get("PL_GLOBAL_SEED", torch.initial_seed()))


@contextmanager
def sample_rng(seed: int, purpose: str, epoch: int, index: int) -> Iterator[None]:
    """Inside the block python's, numpy's and torch's CPU generators are functions of (seed, purpose, epoch,
    index); afterwards they are as before.

    So an augmentation is the same whichever rank or worker draws it. Costs about 0.1 ms.
    """
    import torch

    # timm draws from the global one
    states = random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state()  # noqa: NPY002
    value = int.from_bytes(hashlib.sha256(f"{seed}/{purpose}/{epoch}/{index}".encode()).digest()[:8])
    random.seed(value)
    np.random.seed(value % 2**32)  # noqa: NPY002
    torch.default_generator.manual_seed(
        value
    )  # torch.manual_seed would also queue a seed for CUDA at every sample
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])
