"""Which device encodes, and in which numbers."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch

from mhla_lightning.data.prepare.parallel import Interrupted
from mhla_lightning.errors import UserError, unknown_name

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_held: list[int] = []  # descriptors of the locks of this process


def find_devices(spec: str = "auto") -> tuple[str, ...]:
    """The devices to encode on, one process each: all GPUs or else the CPU for "auto", or names of torch such
    as cuda:0, in a list with commas.

    Raises UserError for a device that there is not, and for devices of several types, which would not give
    the same bits.
    """
    if spec == "auto":
        return tuple(f"cuda:{number}" for number in range(torch.cuda.device_count())) or ("cpu",)
    names = tuple(name.strip() for name in spec.split(","))
    for name in names:
        try:
            torch.empty(0, device=name)
        except Exception as error:
            # an AssertionError of a torch without CUDA, a RuntimeError of an unknown name, an
            # AcceleratorError
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"--device {name} cannot be used ({reason[:150]}): auto, cpu, cuda, or cuda:0,cuda:1"
            ) from error
    if len({torch.device(name).type for name in names}) > 1:
        raise UserError(
            f"--device {spec} names devices of several types, which do not give the same bits: name one type"
        )
    return names


def find_dtype(name: str | None, device: str) -> str:
    """A name of DTYPES; None: bf16 on a GPU, else fp32. Raises UserError for an unknown one."""
    if name is None:
        return "bf16" if torch.device(device).type == "cuda" else "fp32"
    if name not in DTYPES:
        raise UserError(unknown_name("--dtype", name, DTYPES))
    return name


@lru_cache(maxsize=8)
def own_device(folder: Path, devices: Sequence[str]) -> str:
    """The device of this process: the first that no other process which works on `folder` holds. The
    kernel lets it go when the process ends.
    """
    for number, device in enumerate(devices):
        descriptor = os.open(
            folder / f"device-{number}.lock", os.O_WRONLY | os.O_CREAT
        )  # held until the process ends
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            continue
        _held.append(descriptor)
        return device
    raise Interrupted(
        f"all of {', '.join(devices)} are held by other processes that make {folder}: wait for them, "
        "and run the same command again"
    )


def release_devices() -> None:
    """Let go what own_device gave this process, so that others can have it."""
    own_device.cache_clear()
    while _held:
        os.close(_held.pop())
