"""One more token of every sequence, from the model to the choice, without the host.

The launches of a small token take longer than its kernels: 24 layers have some 500. A CUDA graph starts them
all at once. It runs the same kernels on the same memory again, so nothing may depend on the host. Positions
are counted on the device. What one token hands on to the next is written in place. Random numbers come from a
buffer that the host fills ahead.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from mhla_lightning.errors import UserError
from mhla_lightning.inference.text.sampling import Sampling

CudaGraph = Literal["auto", "on", "off"]
Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""Turns a call into a call that runs the same kernels again."""
log = logging.getLogger(__name__)
_EAGER_TOKENS = 2  # before a capture, so that every kernel is compiled and loaded


class StepsBackbone(Protocol):
    """The method of a language model that adds a token."""

    def step(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]: ...


@runtime_checkable
class HostFreeBackbone(StepsBackbone, Protocol):
    """A language model whose steps can do without the host (`backbones.CausalLM`)."""

    def fix_state(self, state: Any, tokens: int) -> None: ...

    def host_needed(self, state: Any) -> str | None: ...

    def check_length(self, tokens: int) -> None: ...


def cuda_graph(run: Callable[[], None]) -> Callable[[], None]:
    """Capture a call as a CUDA graph; return its replay."""
    graph = torch.cuda.CUDAGraph()
    # Other threads, as of a loader, may use the device meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        run()
    return graph.replay


@dataclass(frozen=True)
class Execution:
    """Where a model runs, and whether one CUDA graph holds a whole token.

    Args:
        device: of the model.
        cuda_graph: `auto` captures where every layer can, `on` demands it, `off` starts each kernel.
        capture: in place of :func:`cuda_graph`, on any device; None takes that one.
    """

    device: torch.device | str = "cpu"
    cuda_graph: CudaGraph = "auto"
    capture: Capture | None = None

    def wanted(self, backbone: object) -> Capture | None:
        """Return what captures tokens of a model; None where every kernel is started.

        Raises:
            UserError: a graph is demanded and impossible.
        """
        here = self.capture is not None or torch.device(self.device).type == "cuda"
        if self.cuda_graph == "off" or (self.cuda_graph == "auto" and not here):
            return None
        reason = None
        if not here:
            reason = f"needs a CUDA device, and the model is on {self.device}"
        elif not isinstance(backbone, HostFreeBackbone):
            reason = f"{type(backbone).__name__} counts tokens on the host"
        if reason is None:
            return self.capture or cuda_graph
        if self.cuda_graph == "on":
            raise UserError("cuda_graph", f"'on' {reason}; take 'auto' or 'off'")
        return None


class Decoding:
    """Sequences that grow token by token.

    A sequence that has ended leaves the batch. Inside a graph it stays until half of them have ended, because
    another batch is another graph.

    Args:
        backbone: the model.
        state: after the prompts.
        sampling: how tokens are chosen.
        vocabulary: only tokens below this number are chosen; None means all.
        execution: where and how.
        most: tokens of the longest sequence at its end.

    Attributes:
        state: of the tokens so far.

    Raises:
        UserError: a graph is demanded and impossible.
    """

    def __init__(
        self,
        backbone: StepsBackbone,
        state: Any,
        sampling: Sampling,
        vocabulary: int | None,
        execution: Execution,
        most: int,
    ) -> None:
        self.backbone, self.state, self.sampling, self.vocabulary = backbone, state, sampling, vocabulary
        self._demanded = execution.cuda_graph == "on"
        self._capture = execution.wanted(backbone)
        self._replay: Callable[[], None] | None = None
        self._eager = 0
        self._rows: list[int] = []
        if self._capture is not None and isinstance(backbone, HostFreeBackbone):
            backbone.fix_state(state, most)

    def first(self, logits: Tensor, keys: Sequence[str]) -> list[int]:
        """Choose the token after each prompt.

        Args:
            logits: (batch, V).
            keys: key of each sequence (:func:`sequence_keys`).

        Raises:
            UserError: logits that are not finite.
        """
        self._keys, self._rows = list(keys), list(range(len(keys)))
        self._chosen = torch.zeros(len(keys), dtype=torch.int64, device=logits.device)
        self._report = self._chosen.clone()
        self._draws = self.sampling.room(len(keys), logits.device)
        self._send_draws(0)
        self._choose(logits)
        return self._read()

    def next(self, position: int, longest: int) -> list[int]:
        """Add the chosen tokens, and choose the following ones of all sequences that are left.

        Args:
            position: number of the new token, from 0.
            longest: tokens of the longest sequence with the chosen one.

        Raises:
            UserError: a sequence beyond what an operator takes; logits that are not finite; a graph is
                demanded and impossible.
        """
        self._send_draws(position)
        if self._capture is not None and isinstance(self.backbone, HostFreeBackbone):
            self.backbone.check_length(longest)
            if self._replay is None and self._eager >= _EAGER_TOKENS:
                self._try_capture(self._capture, self.backbone)
        (self._token if self._replay is None else self._replay)()
        self._eager += 1
        return self._read()

    def keep(self, going: Sequence[int]) -> None:
        """Go on with some of the sequences that are left.

        Args:
            going: their places among those.
        """
        self._rows = [self._rows[place] for place in going]
        if self._replay is not None and 2 * len(self._rows) > len(self._chosen):
            return
        rows = torch.tensor(self._rows).to(self._chosen.device)
        self.state = self.state.reorder(rows)
        self._chosen, self._report, self._draws = (x[rows] for x in (self._chosen, self._report, self._draws))
        self._keys = [self._keys[row] for row in self._rows]
        self._rows, self._replay, self._eager = list(range(len(self._rows))), None, 0

    def _token(self) -> None:
        logits, self.state = self.backbone.step(self._chosen, self.state)
        self._choose(logits)

    def token(self) -> None:
        """Run one token that changes the state's own tensors; nothing waits for the device."""
        logits, state = self.backbone.step(self._chosen, self.state)
        write_over(self.state, state)
        self._choose(logits)

    def _choose(self, logits: Tensor) -> None:
        chosen, sound = self.sampling.select(logits[:, : self.vocabulary], self._draws)
        self._chosen.copy_(chosen)
        self._report.copy_(torch.where(sound, chosen, -1))

    def _try_capture(self, capture: Capture, backbone: HostFreeBackbone) -> None:
        """Capture a token, or never try again. Raises UserError where a graph is demanded."""
        reason = backbone.host_needed(self.state)
        if reason is None:
            try:
                self._replay = capture(self.token)
            except RuntimeError as error:  # nothing has run, so that the state is as before
                reason = f"the capture failed: {error}"
                log.warning("no CUDA graph, each kernel is started by itself: %s", error)
        if reason is None:
            return
        if self._demanded:
            raise UserError("cuda_graph", f"'on' is impossible: {reason}; take 'auto' or 'off'")
        self._capture = None

    def _send_draws(self, position: int) -> None:
        self.sampling.send_draws(self._keys, position, self._draws)

    def _read(self) -> list[int]:
        """Return the chosen tokens of the sequences that are left; this waits for the device."""
        found = self._report.tolist()
        chosen = [found[row] for row in self._rows]
        self.sampling.check(chosen)
        return chosen


def write_over(old: Any, new: Any) -> None:
    """Write the tensors of a state into those of the state before it, where they are others.

    Args:
        old, new: states of the same kind.

    Raises:
        ValueError: a tensor has another shape.
    """
    for into, source in zip(tensors_of(old), tensors_of(new), strict=True):
        if into.shape != source.shape:
            raise ValueError(f"a state grew from {tuple(into.shape)} to {tuple(source.shape)}")
        if into is not source:
            into.copy_(source)


def tensors_of(state: Any) -> list[Tensor]:
    """Return all tensors of dataclasses, lists and tuples, in order."""
    if isinstance(state, Tensor):
        return [state]
    if isinstance(state, (list, tuple)):
        return [x for part in state for x in tensors_of(part)]
    if is_dataclass(state):
        return [x for field in fields(state) for x in tensors_of(getattr(state, field.name))]
    return []
