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


_DEVICES = (
    (r"A100.*80GB", "a100-80g"),
    (r"A100", "a100-40g"),
    (r"A10G", "a10g-24g"),
    (r"RTX A6000", "a6000-48g"),
    (r"B200", "b200-180g"),
    (r"H100 (80GB HBM3|SXM)", "h100-80g"),
    (r"H200", "h200-141g"),
    (r"L40S", "l40s-48g"),
    (r"L4$", "l4-24g"),
    (r"RTX 3090$", "rtx3090-24g"),
    (r"RTX 4090$", "rtx4090-24g"),
    (r"T4$", "t4-16g"),
    (r"V100", "v100-16g"),
)


def peak_of_device(device: str, precision: str, products: str) -> float | None:
    """Return the dense peak of a GPU's matrix products in FLOP/s; None for an unknown GPU.

    Args:
        device: as torch.cuda.get_device_name gives it.
        precision: of Lightning's trainer.
        products: of torch.get_float32_matmul_precision. TF32 has half the peak of bf16.
    """
    name = next((name for pattern, name in _DEVICES if re.search(pattern, device)), None)
    if name is None:
        return None
    gpu = GPUS[name]
    if precision.startswith(("bf16", "16")):
        return gpu.bf16
    return gpu.fp32 if products == "highest" or gpu.bf16 is None else max(gpu.fp32 or 0.0, gpu.bf16 / 2)


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
