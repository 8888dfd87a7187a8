"""Times that can be compared.

The cases take turns, and ratios are taken within a turn, so that a drifting machine cancels.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mhla_lightning.attention import Attention, build_attention
from mhla_lightning.planning.memory import peak_bytes

GEMM_SIDE = 2048
SLOW = 20.0  # seconds; a slower case is measured once


@dataclass
class Case:
    """One operator at one token count, alone or inside a backbone.

    Attributes:
        flops: of the forward.
        run_forward: None where only steps are measured.
        forward, step: seconds of every turn; step is forward and backward.
        forward_cpu, step_cpu: seconds of processor time of all threads together, which other work on the
            machine adds little to.
        gemm: seconds that the matrix product of the same turn would need for the forward FLOPs.
        peak_bytes: tensors held at once by a step, at most, besides its inputs.
    """

    operator: str
    tokens: int
    flops: int
    run_forward: Callable[[], Any] | None
    run_step: Callable[[], Any]
    peak_bytes: int = 0
    forward: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)
    forward_cpu: list[float] = field(default_factory=list)
    step_cpu: list[float] = field(default_factory=list)
    gemm: list[float] = field(default_factory=list)

    def release(self) -> None:
        """Lets the tensors go; the times stay."""
        self.run_forward, self.run_step = None, lambda: None

    def row(self) -> dict[str, Any]:
        """Medians, as the table and the JSON file show them."""
        forward = {}
        if self.forward:
            forward = {
                "forward_seconds": statistics.median(self.forward),
                "forward_cpu_seconds": statistics.median(self.forward_cpu),
                "forward_over_gemm": ratio(self.forward, self.gemm),
            }
        return {
            "operator": self.operator,
            "tokens": self.tokens,
            "flops_forward": self.flops,
            **forward,
            "step_seconds": statistics.median(self.step),
            "step_cpu_seconds": statistics.median(self.step_cpu),
            "step_over_gemm": ratio(self.step, self.gemm) / 3,
            "peak_bytes": self.peak_bytes,
            "turns": len(self.step),
        }


def make_case(
    name: str,
    entry: str | dict[str, Any],
    tokens: int,
    *,
    heads: int,
    dim: int,
    batch: int,
    device: torch.device,
    causal: bool = False,
    grid: Sequence[int] | None = None,
) -> Case:
    """Return an operator with inputs (batch, tokens, heads, dim) in float32.

    Tokens are in raster order on `grid`, else on one axis.
    """
    operator = build_attention(
        entry, heads=heads, dim_k=dim, dim_v=dim, grid=(tokens,) if grid is None else grid, causal=causal
    ).to(device)
    q, k, v = (torch.randn(batch, tokens, heads, dim, device=device, requires_grad=True) for _ in range(3))
    cotangent = torch.randn(batch, tokens, heads, dim, device=device)

    def step() -> Any:
        return torch.autograd.grad(operator(q, k, v), [q, k, v, *operator.parameters()], cotangent)

    flops = batch * operator.flops(tokens, heads, dim, dim)
    return Case(
        name, tokens, flops, lambda: _forward(operator, q, k, v), step, peak_bytes=peak_bytes(step, device)
    )


@torch.no_grad()
def _forward(operator: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return operator(q, k, v)


def take_turns(
    cases: Sequence[Case], turns: int, device: torch.device, on_case: Callable[[Case], None]
) -> list[float]:
    """Time all cases in turn; return the GEMM rate of every turn in FLOP/s.

    `turns` turns follow a warm-up. Slow cases run once, without warm-up.

    on_case: called before a case has its turn, len(cases) x (turns + 1) times in all, also for slow ones that
        are passed over.
    """
    square = torch.randn(GEMM_SIDE, GEMM_SIDE, device=device)
    rates: list[float] = []
    for turn in range(turns + 1):
        seconds = statistics.median(_seconds(lambda: square @ square, device)[0] for _ in range(3))
        rates.append(2 * GEMM_SIDE**3 / seconds)
        for case in cases:
            on_case(case)
            if case.step and case.step[-1] > SLOW:
                continue
            forward = _seconds(case.run_forward, device) if case.run_forward else None
            step = _seconds(case.run_step, device)
            if turn > 0 or step[0] > SLOW:  # the first turn warms up
                _note(case, forward, step)
                case.gemm.append(case.flops / rates[-1])
    return rates[1:]


def _note(case: Case, forward: tuple[float, float] | None, step: tuple[float, float]) -> None:
    if forward is not None:
        case.forward.append(forward[0])
        case.forward_cpu.append(forward[1])
    case.step.append(step[0])
    case.step_cpu.append(step[1])


def _seconds(run: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """By the clock, and of processor time."""
    _synchronize(device)
    start, cpu = time.perf_counter(), time.process_time()
    run()
    _synchronize(device)
    return time.perf_counter() - start, time.process_time() - cpu


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """Median of a/b turn by turn; where one of them ran once only, of medians."""
    if len(a) == len(b):
        return statistics.median(x / y for x, y in zip(a, b, strict=True))
    return statistics.median(a) / statistics.median(b)


def slope(tokens: Sequence[int], seconds: Sequence[float]) -> float:
    """Least-squares slope of log time over log tokens: 1 is linear, 2 quadratic."""
    x, y = [math.log(n) for n in tokens], [math.log(s) for s in seconds]
    return statistics.linear_regression(x, y).slope
