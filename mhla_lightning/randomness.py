"""Random numbers that follow from a key, not from the state of a process.

A key names a use: (seed, purpose, epoch, sample). The same sample gets the same numbers on any rank, in any
worker and after a resume. So a step is the same function of the global batch however the batch is split.

Code of ours asks for a generator by key: :func:`philox` where the numbers are stored or promised,
:func:`generator` elsewhere. Libraries that use global generators (timm's augmentation) run inside
:func:`sample_rng`, which seeds those by key and restores them. :func:`run_seed` is the seed of all keys.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np


def philox(*key: int | str) -> np.random.Philox:
    """Return a bit generator for a key.

    numpy promises that a bit generator's raw output never changes. It does not promise that for the
    distributions of :func:`generator`.

    Args:
        key: parts of the key; their text counts.
    """
    name = "/".join(str(part) for part in key)
    return np.random.Philox(key=int.from_bytes(hashlib.blake2b(name.encode(), digest_size=16).digest()))


def generator(*key: int | str) -> np.random.Generator:
    """Return numpy's distributions over the bit generator of a key, see :func:`philox`."""
    return np.random.Generator(philox(*key))


def run_seed() -> int:
    """Return the run's seed.

    It is the seed that seed_everything left in the environment, else that of torch's generator.
    """
    import torch  # imported here: loader workers and the data commands need numpy alone

    return int(os.environ.get("PL_GLOBAL_SEED", torch.initial_seed()))


@contextmanager
def sample_rng(seed: int, purpose: str, epoch: int, index: int) -> Iterator[None]:
    """Seed the global CPU generators by key in the block; restore them afterwards.

    They are python's, numpy's and torch's. An augmentation then is the same in any rank and worker. One use
    costs about 0.1 ms.

    Args:
        seed: the run's.
        purpose: name of the use, so that two uses differ.
        epoch, index: of the sample.
    """
    import torch

    # timm uses numpy's global generator.
    states = random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state()  # noqa: NPY002
    value = int.from_bytes(hashlib.sha256(f"{seed}/{purpose}/{epoch}/{index}".encode()).digest()[:8])
    random.seed(value)
    np.random.seed(value % 2**32)  # noqa: NPY002
    # torch.manual_seed would also queue a seed for CUDA at every sample.
    torch.default_generator.manual_seed(value)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])
