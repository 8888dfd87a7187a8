"""A real sum over two processes, with the backend that CPU training uses."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

from mhla_lightning.cli.doctor.finding import Finding

WORLD = 2
LIMIT = 30.0  # seconds
_CODE = (
    "import sys; from mhla_lightning.cli.doctor.processes import sum_of_ranks; "
    "print(sum_of_ranks(int(sys.argv[1]), sys.argv[2]))"
)


def two_processes() -> Finding:
    """Two processes find each other and agree on a sum."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        commands = [
            [sys.executable, "-c", _CODE, str(rank), str(Path(folder) / "rendezvous")]
            for rank in range(WORLD)
        ]
        children = [
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for command in commands
        ]
        try:
            outputs = [
                child.communicate(timeout=max(0.1, LIMIT - (time.monotonic() - began))) for child in children
            ]
        except subprocess.TimeoutExpired:
            return Finding(
                "fail", f"two processes did not find each other within {LIMIT:.0f} s (gloo); {_ADVICE}"
            )
        finally:
            _end(children)
    return judge([out for out, _ in outputs], [err for _, err in outputs], time.monotonic() - began)


_ADVICE = (
    "GLOO_SOCKET_IFNAME=lo python -m mhla_lightning doctor tells whether the network interface is the reason"
)


def judge(outputs: list[str], errors: list[str], seconds: float) -> Finding:
    """What the processes printed, against the sum that they should have found."""
    right = sum(range(1, WORLD + 1))
    if all(output.split() == [str(float(right))] for output in outputs):
        return Finding(
            "ok", f"gloo all-reduce over {WORLD} processes is right ({seconds:.1f} s with the start)"
        )
    last = next((lines[-1] for error in errors if (lines := error.strip().splitlines())), "no error message")
    found = ", ".join(output.strip() or "nothing" for output in outputs)
    return Finding(
        "fail", f"gloo all-reduce over {WORLD} processes gave {found} instead of {right}: {last}; {_ADVICE}"
    )


def _end(children: list[subprocess.Popen[str]]) -> None:
    for child in children:
        if child.poll() is None:
            child.kill()
        child.communicate()  # closes the pipes


def sum_of_ranks(rank: int, rendezvous: str) -> float:
    """One of the processes: the sum of rank + 1 over all of them."""
    import torch
    import torch.distributed as dist

    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=LIMIT),
    )
    value = torch.tensor(float(rank + 1))
    dist.all_reduce(value)
    dist.destroy_process_group()
    return float(value)
