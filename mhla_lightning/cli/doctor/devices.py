"""Processor, memory, GPUs and disk."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from pathlib import Path

from rich.filesize import decimal

from mhla_lightning.cli.doctor.finding import Finding
from mhla_lightning.runs.folder import runs_root

LITTLE_DISK = 10 * 10**9
LITTLE_SHARED = 10**9
_SHARED = Path("/dev/shm")


def usable_cores() -> int:
    """Cores that this process may run on; a container's or a job's share, not the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> Finding:
    """Threads fit the cores."""
    import torch

    cores, threads = usable_cores(), torch.get_num_threads()
    text = (
        f"{cores} of {os.cpu_count()} cores usable, torch uses {threads} threads (OMP_NUM_THREADS "
        f"{os.environ.get('OMP_NUM_THREADS', 'not set')})"
    )
    if threads > cores:
        return Finding(
            "warn", f"{text}; more threads than cores slow training down: export OMP_NUM_THREADS={cores}"
        )
    return Finding("ok", text)


def compiler() -> Finding:
    """A C++ compiler is there; it is wanted for one operation."""
    from mhla_lightning.attention.mhla.cpu.building import find_compiler

    found = find_compiler()
    if found is None:
        return Finding(
            "warn", "none; MHLA of short rows on a CPU takes torch's own operations, which are slower"
        )
    return Finding("ok", found)


def memory() -> Finding:
    """Shared memory has room for the batches of loader workers (a container often gets 64 MB)."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    text = f"{decimal(total)} of memory"
    if not _SHARED.is_dir():
        return Finding("ok", text)
    shared = shutil.disk_usage(_SHARED).free
    text += f", {decimal(shared)} of shared memory free"
    if shared < LITTLE_SHARED:
        return Finding(
            "warn",
            f"{text}; loader workers may die: start the container with --shm-size=8g, or use "
            "--data.num_workers 0",
        )
    return Finding("ok", text)


def gpu() -> Finding:
    """CUDA devices that torch sees."""
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count:
        found = [torch.cuda.get_device_properties(index) for index in range(count)]
        names = ", ".join(f"{device.name} ({decimal(device.total_memory)})" for device in found)
        return Finding(
            "ok", f"{count} CUDA device{'s' if count > 1 else ''}: {names}; CUDA {torch.version.cuda}"
        )
    if Path("/dev/nvidia0").exists():
        reason = (
            " ".join(str(caught[-1].message).split())
            if caught
            else f"torch {torch.__version__} is built for CUDA {torch.version.cuda}"
        )
        return Finding("warn", f"there is an NVIDIA device that torch cannot use: {reason}")
    return Finding("ok", "no CUDA device; the _cpu recipes train without one")


def runs_folder() -> Finding:
    """Run folders can be written, and there is room for checkpoints."""
    root = runs_root()
    existing = next(path for path in (root, *root.parents) if path.is_dir())
    try:
        with tempfile.TemporaryFile(dir=existing):
            free = shutil.disk_usage(existing).free
    except OSError as error:
        return Finding(
            "fail", f"{root} cannot be written: {error.strerror}; choose another with --runs or $MHLA_RUNS"
        )
    text = f"{root}{'' if existing == root else ' (made with the first run)'}, {decimal(free)} free"
    if free < LITTLE_DISK:
        return Finding("warn", f"{text}; checkpoints need room: choose another with --runs or $MHLA_RUNS")
    return Finding("ok", text)
