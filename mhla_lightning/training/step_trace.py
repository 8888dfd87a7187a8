"""`trainer.profiler: pytorch`: a trace of a few training steps."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.profilers import Profiler
from torch.profiler import ProfilerActivity, record_function

log = logging.getLogger(__name__)
_BATCH = "run_training_batch"  # Lightning's action around one micro batch
_ROOM = 100  # letters of an action's name that a trace shows


class StepTrace(Profiler):
    """Traces a few micro batches of training into a file that https://ui.perfetto.dev opens.

    Every hook of Lightning is a slice above its operators, and on a GPU its kernels are beside them. The file
    is `trace-rank-N.json.gz` in the folder of the logger. Lightning's PyTorchProfiler traces all it is told
    of, validation too: tens of megabytes in a minute of a tiny model, and it slows the whole run.

    Args:
        skip: micro batches before the trace, which allocate and compile. One more warms the profiler up.
        active: micro batches in the trace.
    """

    def __init__(self, skip: int = 5, active: int = 3) -> None:
        super().__init__()
        self.skip, self.active = skip, active
        self._seen = 0
        self._trace: torch.profiler.profile | None = None
        self._open: dict[str, Any] = {}

    def start(self, action_name: str) -> None:
        if action_name == _BATCH:
            self._begin()
        if self._trace is not None and action_name not in self._open:
            self._open[action_name] = record_function(action_name[:_ROOM])
            self._open[action_name].__enter__()

    def stop(self, action_name: str) -> None:
        if (opened := self._open.pop(action_name, None)) is not None:
            opened.__exit__(None, None, None)
        if action_name == _BATCH and self._trace is not None:
            self._trace.step()
            if self._seen == self.skip + 1 + self.active:
                self._end()

    def _begin(self) -> None:
        self._seen += 1
        if self._seen != self.skip + 1:
            return
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._trace = torch.profiler.profile(
            activities=activities,
            schedule=torch.profiler.schedule(wait=0, warmup=1, active=self.active, repeat=1),
            on_trace_ready=self._export,
            record_shapes=True,
        )
        self._trace.start()

    def _end(self) -> None:
        """End the trace; what it holds is written."""
        trace, self._trace = self._trace, None
        for opened in reversed(self._open.values()):
            opened.__exit__(None, None, None)
        self._open.clear()
        if trace is not None:
            trace.stop()

    def _export(self, trace: torch.profiler.profile) -> None:
        folder = Path(self.dirpath or ".")
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        path = folder / f"trace-rank-{rank}.json.gz"
        folder.mkdir(parents=True, exist_ok=True)
        trace.export_chrome_trace(str(path))
        log.info(f"trace of {self.active} micro batches: {path}; open it at https://ui.perfetto.dev")

    def summary(self) -> str:
        """Nothing: the trace is a file of its own."""
        return ""

    def teardown(self, stage: str | None) -> None:
        """End a trace that is open still; a run that is too short has none."""
        if self._trace is not None or 0 < self._seen <= self.skip:
            needed = self.skip + 1 + self.active
            log.warning(f"the run has {self._seen} micro batches, and a trace needs {needed}")
        self._end()
        super().teardown(stage)
