"""What is known of GPUs: memory and peak speed, from the makers' data sheets."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from mhla_lightning.errors import UserError, unknown_name

GIB, MIB = 2**30, 2**20
USABLE = 0.92
"""Share of a GPU's memory that tensors may take; the rest is the CUDA context, NCCL's and cuBLAS's buffers
and gaps between tensors.
"""


@dataclass(frozen=True)
class GPU:
    """A kind of GPU.

    Attributes:
        name: key of GPUS.
        memory: bytes that a process sees.
        bf16: dense peak of bf16 matrix products, FLOP/s; None where the hardware has none.
        fp32: the same of float32, without TF32, as PyTorch computes by default.
    """

    name: str
    memory: int
    bf16: float | None = None
    fp32: float | None = None

    @property
    def usable(self) -> int:
        """Bytes for tensors."""
        return int(USABLE * self.memory)


def _gpu(name: str, gib: float, bf16: float | None, fp32: float) -> GPU:
    return GPU(name, int(gib * GIB), None if bf16 is None else bf16 * 1e12, fp32 * 1e12)


# GiB as nvidia-smi shows them, then TFLOP/s.
GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("a100-40g", 39.5, 312, 19.5),
        _gpu("a100-80g", 79.3, 312, 19.5),
        _gpu("a10g-24g", 22.5, 70, 31.2),
        _gpu("a6000-48g", 47.5, 155, 38.7),
        _gpu("b200-180g", 178.4, 2250, 75),
        _gpu("h100-80g", 79.2, 989, 67),
        _gpu("h200-141g", 139.8, 989, 67),
        _gpu("l4-24g", 22.0, 121, 30.3),
        _gpu("l40s-48g", 44.5, 362, 91.6),
        _gpu("rtx3090-24g", 23.7, 71, 35.6),
        _gpu("rtx4090-24g", 23.6, 165, 82.6),
        _gpu("t4-16g", 14.7, None, 8.1),
        _gpu("v100-16g", 15.8, None, 15.7),
        _gpu("v100-32g", 31.7, None, 15.7),
    )
}
"""name -> GPU."""


def find_gpu(name: str | None, memory: str | None = None) -> GPU | None:
    """Return a GPU by name, by its memory, or by both.

    Args:
        name: key of GPUS; None takes a GPU of which only the memory is known.
        memory: as `40GiB`; None takes that of the name. None for both returns None.

    Raises:
        UserError: an unknown name, or a memory that is no size.
    """
    if name is not None and name not in GPUS:
        raise UserError("gpu", f"{unknown_name('GPU', name, GPUS)}; or give `gpu_memory`, for example 40GiB")
    if memory is None:
        return None if name is None else GPUS[name]
    known = GPUS[name] if name is not None else GPU(memory, 0)
    return GPU(known.name, parse_bytes(memory, "gpu_memory"), known.bf16, known.fp32)


_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def parse_bytes(text: str, key: str) -> int:
    """Return the bytes of `40GiB`, `80 GB` or a number.

    Raises:
        UserError: another text; `key` is the error's.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    size = (
        math.nan
        if match is None or match[2].upper() not in _UNITS
        else float(match[1]) * _UNITS[match[2].upper()]
    )
    if not size > 0:
        raise UserError(key, f"'{text}' is no size above 0; write for example 40GiB or 80GB")
    return int(size)
