"""Text that is continued by replays of one captured token, for the process of `interpreter.py`.

A tape stands in for a CUDA graph. It takes down the operations and kernels of one call with their tensors,
and runs them again on the same memory. Python does not run again, as in a graph: whatever the host would have
to count or to decide stays as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mhla_lightning.backbones import build_backbone
from mhla_lightning.inference.text import Execution, Sampling, generate
from mhla_lightning.inference.text.token_graph import Decoding, tensors_of

MHLA = {"name": "mhla", "chunk_size": 3, "max_chunks": 4, "heads": 2, "kernel": "triton"}
GATED = {"mix_form": "relative", "decay": "token", "decay_span": "sequence", "normalizer": "block"}
LAYERS: list[dict[str, Any]] = [
    {**MHLA, "extrapolation": "shift"},
    {**MHLA, **GATED, "max_chunks": 3, "short_conv": 2},
    {"name": "linear", "heads": 2, "decay": "token", "kernel": "triton"},
]
SIZES = {"vocab_size": 13, "context": 32, "embed_dim": 32, "intermediate": 16}
PROMPTS = [[1, 2, 3, 4], [5], [7, 7]]
LENGTHS = [99, 4, 5]  # tokens after which each prompt's text ends


class Tape(TorchDispatchMode):
    """Runs captured calls again.

    Attributes:
        captured, replayed: counts.
    """

    def __init__(self) -> None:
        super().__init__()
        self.captured = self.replayed = 0
        self._ops: list[Callable[[], None]] = []

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """Take a token down; its effects are undone, since a capture runs nothing."""
        from mhla_lightning.attention.mhla.triton import decode

        decoding = getattr(run, "__self__", None)
        assert isinstance(decoding, Decoding)
        held = tensors_of([decoding.state, *vars(decoding).values()])
        before, start = [x.clone() for x in held], decode.start
        self._ops, self.captured = [], self.captured + 1

        def started(launch: Any) -> None:
            count = len(self._ops)
            start(launch)
            self._ops[count:] = [lambda: start(launch)]

        decode.start = started
        try:
            with self:
                run()
        finally:
            decode.start = start
        for tensor, value in zip(held, before, strict=True):
            tensor.copy_(value)
        ops = self._ops

        def replay() -> None:
            self.replayed += 1
            for op in ops:
                op()

        return replay

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host reads a number"
        out = func(*args, **kwargs)
        memory = {x.untyped_storage().data_ptr() for x in _tensors((args, kwargs))}
        new = [x.untyped_storage().data_ptr() not in memory for x in _tensors(out)]
        if any(new) or func._schema.is_mutable:
            self._ops.append(lambda: _again(func, args, kwargs, _tensors(out), new))
        return out


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def _again(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], outs: Sequence[Tensor], new: Sequence[bool]
) -> None:
    for into, made, fresh in zip(outs, _tensors(func(*args, **kwargs)), new, strict=True):
        if fresh:
            into.copy_(made)


Steps = list[tuple[list[int], list[int], dict[int, str]]]


def continued(
    layers: Sequence[Mapping[str, Any]], sampling: Sampling, tokens: int, execution: Execution
) -> Steps:
    """Return the prompts, tokens and ends of every step."""
    torch.manual_seed(0)
    model: Any = build_backbone("lm_tiny", attention=list(layers), depth=len(layers), **SIZES).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    counts = [0] * len(PROMPTS)

    def stop(prompt: int, token: int) -> bool:
        counts[prompt] += 1
        return counts[prompt] == LENGTHS[prompt]

    steps = generate(model, PROMPTS, sampling, tokens, stop=stop, vocabulary=11, device=execution)
    return [(step.prompts, step.tokens, dict(step.finished)) for step in steps]


def replayed(
    layers: Sequence[Mapping[str, Any]], sampling: Sampling, tokens: int
) -> tuple[Steps, Steps, int, int]:
    """Return the steps without and with a tape, and how often a token was captured and replayed."""
    tape = Tape()
    eager = continued(layers, sampling, tokens, Execution("cpu", "off"))
    graph = continued(layers, sampling, tokens, Execution("cpu", "on", tape.capture))
    return eager, graph, tape.captured, tape.replayed
