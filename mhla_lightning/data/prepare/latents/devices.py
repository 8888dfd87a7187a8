"""The devices that encode, and their number formats."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from filelock import FileLock

from mhla_lightning.data.prepare.locking import try_lock
from mhla_lightning.data.prepare.parallel import Interrupted
from mhla_lightning.errors import UserError, unknown_name

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_held: list[FileLock] = []  # of this process


def find_devices(device: str = "auto") -> tuple[str, ...]:
    """Return the devices to encode on; each gets one process.

    Args:
        device: auto for all GPUs or else the CPU, or names of torch such as cuda:0, separated by commas.

    Raises:
        UserError: a device that does not exist, or devices of several types, which would not give the same
            bits.
    """
    if device == "auto":
        return tuple(f"cuda:{number}" for number in range(torch.cuda.device_count())) or ("cpu",)
    names = tuple(name.strip() for name in device.split(","))
    for name in names:
        try:
            torch.zeros(1, device=name).item()  # `meta` holds no numbers
        except Exception as error:
            # An AssertionError of a torch without CUDA, a RuntimeError of an unknown name, or an
            # AcceleratorError.
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                "device", f"{name} cannot be used ({reason[:150]}); choose auto, cpu, cuda, or cuda:0,cuda:1"
            ) from error
    if len({torch.device(name).type for name in names}) > 1:
        raise UserError(
            "device",
            f"{device} names devices of several types, which do not give the same bits; name one type",
        )
    return names


def find_dtype(dtype: str | None, device: str) -> str:
    """Return a name of DTYPES.

    Args:
        dtype: None is bf16 on a GPU, else fp32.
        device: of torch.

    Raises:
        UserError: an unknown name.
    """
    if dtype is None:
        return "bf16" if torch.device(device).type == "cuda" else "fp32"
    if dtype not in DTYPES:
        raise UserError("dtype", unknown_name("format", dtype, DTYPES))
    return dtype


@lru_cache(maxsize=8)
def own_device(folder: Path, devices: Sequence[str]) -> str:
    """Return the device of this process: the first that no other process of `folder` holds.

    The process holds it until release_devices, or until the process ends.

    Args:
        folder: of the work; the locks are in it.
        devices: to choose from.

    Raises:
        Interrupted: other processes hold all of them.
    """
    for number, name in enumerate(devices):
        lock = try_lock(folder / f"device-{number}.lock")
        if lock is not None:
            _held.append(lock)
            return name
    raise Interrupted(
        "device",
        f"other processes that make {folder} hold all of {', '.join(devices)}; wait for them, "
        "and run the same command again",
    )


def release_devices() -> None:
    """Release the devices that own_device gave this process."""
    own_device.cache_clear()
    while _held:
        _held.pop().release()
