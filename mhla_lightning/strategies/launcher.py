"""How rank 0 starts the other ranks of its machine."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from mhla_lightning.runs.ranks import RANK_ZERO, Watch


class RankLauncher(_SubprocessScriptLauncher):
    """Lightning's kills all ranks within 5 s after one has failed, this process too, and says nothing; where
    this process is killed the others stay.

    Args:
        standard: Lightning's, which is replaced.
        run: the run folder.

    Attributes:
        watch: over the ranks that were started; None before, and where something else starts them.
    """

    def __init__(self, standard: _SubprocessScriptLauncher, run: Path) -> None:
        super().__init__(standard.cluster_environment, standard.num_processes, standard.num_nodes)
        self.folder = run
        self.watch: Watch | None = None

    def launch(
        self, function: Callable[..., Any], *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any
    ) -> Any:
        """Starts the ranks, once, then calls the function."""
        environment = self.cluster_environment
        environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not environment.creates_processes_externally:
            os.environ[RANK_ZERO] = str(os.getpid())
            first = environment.node_rank() * self.num_processes + 1
            self._call_children_scripts()
            self.watch = Watch(self.procs, first, self.num_processes * self.num_nodes, self.folder)
            self.watch.start()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **kwargs)

    def kill(self, signum: int) -> None:
        """Hands a signal on: what Lightning does with Ctrl-C and SIGTERM."""
        if self.watch is not None:
            self.watch.asked = True
        super().kill(signum)


def watch_ranks(trainer: pl.Trainer, run: Path) -> None:
    """Puts RankLauncher in the place of Lightning's launcher, where it has one."""
    standard = trainer.strategy.launcher
    if isinstance(standard, _SubprocessScriptLauncher):
        trainer.strategy._launcher = RankLauncher(standard, run)


def watch_of(trainer: pl.Trainer) -> Watch | None:
    """The watch over the ranks that this process has started; None where it has started none."""
    return getattr(trainer.strategy.launcher, "watch", None)


def lost_a_rank(error: BaseException) -> bool:
    """Whether an error is what a collective says of a rank that is gone."""
    if isinstance(error, torch.distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and any(
        word in str(error) for word in ("gloo", "NCCL", "Connection closed", "Connection reset")
    )
