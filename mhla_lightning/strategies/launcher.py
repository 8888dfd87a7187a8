"""How rank 0 starts the other ranks of its machine, and watches them.

Lightning's launcher would start the ranks, too. But it kills all of them, this process included, within 5 s
after one has failed, and prints no reason. When this process is killed, the others stay.

torch's elastic agent (torch.distributed.launcher) does not replace this file either (torch 2.14):

- It is one more process that imports torch. Rank 0 becomes its child, so the process that a user starts has
  neither the progress bar nor the lock of the run folder.
- After a SIGTERM it kills ranks that have not ended in 30 s, even in the middle of a checkpoint.
- Its TORCHELASTIC variables make Lightning choose the environment of a cluster.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import ParallelStrategy

from mhla_lightning.errors import UserError
from mhla_lightning.runs.ranks import RANK_ZERO, Watch

_MOST_RANKS = 1024  # that one machine starts


class RankEnvironment(LightningEnvironment):
    """Lightning's environment of one machine, which starts the further ranks itself.

    Lightning's launcher asks an environment to validate the number of ranks, then asks whether somebody else
    starts them. The ranks are started in between, and the answer to the second question is yes.

    Args:
        run: the run folder.

    Attributes:
        watch: over the ranks that this process has started; None before, and where another program (torchrun,
            srun) starts them.
    """

    def __init__(self, run: Path) -> None:
        super().__init__()
        self.folder = run
        self.watch: Watch | None = None

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Start the further ranks of this machine, once."""
        super().validate_settings(num_devices=num_devices, num_nodes=num_nodes)
        if self.creates_processes_externally:
            return
        if num_devices > _MOST_RANKS:
            raise UserError(
                "trainer.devices", f"{num_devices} is too large; a machine has at most {_MOST_RANKS} ranks"
            )
        os.environ |= {
            RANK_ZERO: str(os.getpid()),
            "MASTER_ADDR": self.main_address,
            "MASTER_PORT": str(self.main_port),
            "NODE_RANK": str(self.node_rank()),
            "LOCAL_RANK": "0",
            "WORLD_SIZE": str(num_devices * num_nodes),
        }
        started = [
            subprocess.Popen(_same_command(), env={**os.environ, "LOCAL_RANK": str(rank)})
            for rank in range(1, num_devices)
        ]
        first = self.node_rank() * num_devices + 1
        self.watch = Watch(started, first, num_devices * num_nodes, self.folder)
        self.watch.start()


def _same_command() -> list[str]:
    """Return the command that started this process."""
    main = sys.modules["__main__"].__spec__
    program = ["-m", main.name] if main is not None else [os.path.abspath(sys.argv[0])]
    return [sys.executable, *program, *sys.argv[1:]]


def watch_of(trainer: pl.Trainer) -> Watch | None:
    """Return the watch over the ranks that this process has started; None without any."""
    strategy = trainer.strategy
    environment = strategy.cluster_environment if isinstance(strategy, ParallelStrategy) else None
    return environment.watch if isinstance(environment, RankEnvironment) else None


def lost_a_rank(error: BaseException) -> bool:
    """Whether an error is that of a collective whose other rank is gone."""
    if isinstance(error, torch.distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and any(
        word in str(error) for word in ("gloo", "NCCL", "Connection closed", "Connection reset")
    )
