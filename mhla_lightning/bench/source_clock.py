"""A clock that splits the time of a step by source.

Each moment belongs to one source, so the times add up to the whole.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.profilers import Profiler

from mhla_lightning.tasks.projection import PROJECTION

FORWARD, BACKWARD, ZERO, CLIP = "forward and loss", "backward", "zeroing gradients", "gradient clipping"
ADAMW, SCHEDULE, AVERAGE = "AdamW", "learning-rate schedule", "average of the weights"
SAME = (FORWARD, ZERO, BACKWARD, CLIP, ADAMW)
"""What both sides leave to the very same calls, in their order; all else is Lightning's own, or the
platform's.
"""
DATA, WRAPPER, TASK, LOGGING, LOOPS = (
    "data hand-over",
    "optimizer wrapper",
    "hooks of the task",
    "logging",
    "loops and other hooks",
)
GRADIENT_NORM = "Health: gradient norm"

_ACTION = re.compile(
    r"\[(\w+)\](.*)\.(\w+)"
)  # what Lightning calls a hook when it asks its profiler to time it
_STEP_HOOKS = {
    "training_step": FORWARD,
    "backward": BACKWARD,
    "optimizer_zero_grad": ZERO,
    "configure_gradient_clipping": CLIP,
    "lr_scheduler_step": SCHEDULE,
    "optimizer_step": WRAPPER,
    "batch_to_device": DATA,
    "train_dataloader_next": DATA,
    "on_before_batch_transfer": DATA,
    "transfer_batch_to_device": DATA,
    "on_after_batch_transfer": DATA,
}
_CALLBACK_HOOKS = {
    ("EMA", "on_train_batch_end"): AVERAGE,
    ("Health", "on_before_optimizer_step"): GRADIENT_NORM,
}
_OURS = (*SAME, SCHEDULE, PROJECTION, AVERAGE, DATA, LOGGING)  # actions that are named by their source


def source_of(action: str) -> str:
    """Return the row of the breakdown that a timed action belongs to.

    The hooks of a callback belong to its class.
    """
    match = _ACTION.fullmatch(action)
    if match is None:
        return action if action in _OURS else LOOPS
    kind, owner, hook = match.groups()
    if kind == "Callback":
        name = owner.partition("{")[0]
        return _CALLBACK_HOOKS.get((name, hook), name)
    return _STEP_HOOKS.get(hook, TASK if kind == "LightningModule" else LOOPS)


class SourceClock(Profiler):
    """Gives every moment to the action that was begun last and has not ended.

    Lightning tells its profiler of every hook of callbacks, module and strategy. SimpleProfiler, which it
    ships, counts a hook inside another twice, so that its times add up to nothing. An action costs about 1 us
    more than under no profiler; a step has about a hundred.

    Attributes:
        device: on a GPU `resume` and `pause` wait for it; between them the times are the host's.
        cpu_seconds: CPU time of this process between `resume` and `pause`, which other programs on the
            machine hardly lengthen.
        event_seconds: between CUDA events at `resume` and `pause`; 0 on a CPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.device = torch.device("cpu")
        self.cpu_seconds = self._cpu_since = self.event_seconds = 0.0
        self._began: torch.cuda.Event | None = None
        self._open, self._seconds, self._since = [LOOPS], defaultdict[str, float](float), time.perf_counter()

    def start(self, action_name: str) -> None:
        self._settle()
        self._open.append(action_name)

    def stop(self, action_name: str) -> None:
        self._settle()
        self._open.pop()

    def _settle(self) -> None:
        now = time.perf_counter()
        self._seconds[self._open[-1]] += now - self._since
        self._since = now

    def resume(self) -> None:
        """What has passed since `pause` belongs to nobody."""
        self._wait()
        if self.device.type == "cuda":
            self._began = torch.cuda.Event(enable_timing=True)
            self._began.record()
        self._since, self._cpu_since = time.perf_counter(), time.process_time()

    def pause(self) -> None:
        """Ends what `resume` began; no action begins or ends in between."""
        if self._began is not None:
            ended = torch.cuda.Event(enable_timing=True)
            ended.record()
            self._wait()
            self.event_seconds += self._began.elapsed_time(ended) / 1e3
        self._settle()
        self.cpu_seconds += time.process_time() - self._cpu_since

    def take(self) -> dict[str, float]:
        """Seconds by source since the last call, and forgets them, the CPU's too."""
        taken: dict[str, float] = defaultdict(float)
        for action, seconds in self._seconds.items():
            taken[source_of(action)] += seconds
        self._seconds.clear()
        self.cpu_seconds = self.event_seconds = 0.0
        return dict(taken)

    def watch(self, owner: Any, method: str, action: str) -> None:
        """Times a method that Lightning does not tell its profiler of."""
        setattr(owner, method, self._watched(getattr(owner, method), action))

    def _watched(self, call: Callable[..., Any], action: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.profile(action):
                return call(*args, **kwargs)

        return timed

    def watch_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Time the optimizer's own arithmetic.

        Lightning runs forward and backward inside its step; those are actions of their own.
        """
        optimizer.register_step_pre_hook(lambda *_: self.start(ADAMW))
        optimizer.register_step_post_hook(lambda *_: self.stop(ADAMW))

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
