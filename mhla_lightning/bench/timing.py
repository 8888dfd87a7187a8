"""Times that can be compared.

The cases take turns, and ratios are taken within a turn, so that a drifting machine cancels. On a GPU CUDA
events measure, and calls whose launches may take longer than their kernels are replayed as CUDA graphs.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from mhla_lightning.attention import Attention, CausalAttention, Context, build_attention
from mhla_lightning.planning.memory import peak_bytes

GEMM_SIDE = 2048
GPU_GEMM_SIDE = 8192  # a smaller product does not fill a GPU
SLOW = 20.0  # seconds; a slower case is measured once
SMALL = 5e-3  # seconds; a shorter call on a GPU is replayed as a CUDA graph
_REPEATED = 20e-3  # seconds that the repetitions of one measurement take together
_COLD_BYTES = 2**28  # written before every repetition: more than the second-level cache of any GPU
FLASH, GRAPH = "FlashAttention", "as a CUDA graph"


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
        dtype: of the matrix product.
        on_gpu: how a GPU runs it: the kernel of softmax where one is forced, CUDA graphs or what prevents
            them. Empty on a CPU.
        modelled: seconds of forward and step by the roofline; None where no launch is modelled.
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
    dtype: torch.dtype = torch.float32
    on_gpu: dict[str, str] = field(default_factory=dict)
    modelled: tuple[float, float] | None = None

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
            **self._gpu_row(),
        }

    def _gpu_row(self) -> dict[str, Any]:
        """What a GPU's rows have beside those of a CPU."""
        if not self.on_gpu:
            return {}
        row: dict[str, Any] = {**self.on_gpu, "step_spread_seconds": spread(self.step)}
        if self.forward:
            row["forward_spread_seconds"] = spread(self.forward)
        if self.modelled is not None:
            row["forward_modelled_seconds"], row["step_modelled_seconds"] = self.modelled
        return row


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
    dtype: torch.dtype = torch.float32,
) -> Case:
    """Return an operator with inputs (batch, tokens, heads, dim).

    Tokens are in raster order on `grid`, else on one axis.
    """
    operator = build_attention(
        entry, heads=heads, dim_k=dim, dim_v=dim, grid=(tokens,) if grid is None else grid, causal=causal
    ).to(device)
    shape = (batch, tokens, heads, dim)
    return operator_case(name, operator, shape, dtype, device, _gates(operator, shape, device))


def operator_case(
    name: str,
    operator: Attention,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    context: Context | None = None,
) -> Case:
    """Return the forward and the step of an operator on random q, k and v.

    Args:
        name: of the row; `softmax` runs on FlashAttention where there is a GPU.
        operator: on its device.
        shape: (batch, tokens, heads, dim) of q, k and v.
        dtype: of q, k and v.
        device: of q, k and v.
        context: what the operator reads beside them.
    """
    q, k, v = (_drawn(shape, dtype, device).requires_grad_() for _ in range(3))
    cotangent = _drawn(shape, dtype, device)

    @torch.no_grad()
    def forward() -> Any:
        return operator(q, k, v, context)

    def step() -> Any:
        return torch.autograd.grad(operator(q, k, v, context), [q, k, v, *operator.parameters()], cotangent)

    batch, tokens, heads, dim = shape
    case = Case(name, tokens, batch * operator.flops(tokens, heads, dim, dim), forward, step, dtype=dtype)
    if name == "softmax":
        force_flash(case, device)
    case.peak_bytes = peak_bytes(case.run_step, device)
    return case


def _drawn(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return random tokens; a GPU gets one sample repeated, to save time on the CPU."""
    if device.type == "cpu":
        return torch.randn(shape).to(dtype)
    return torch.randn(1, *shape[1:]).to(device, dtype).repeat(shape[0], 1, 1, 1)


def _gates(operator: Attention, shape: tuple[int, ...], device: torch.device) -> Context | None:
    """Return the decays and betas that an operator reads beside q, k and v; None for most."""
    if not isinstance(operator, CausalAttention) or not operator.token_decay:
        return None
    decays = shape if operator.channel_decay else shape[:3]
    beta = torch.rand(shape[:3]).to(device) if operator.token_beta else None
    return Context(log_decay=-torch.rand(decays).to(device), beta=beta)


def force_flash(case: Case, device: torch.device) -> None:
    """Let torch's fused attention take FlashAttention on a GPU, or say what it takes instead."""
    if device.type != "cuda":
        return
    forward, step = case.run_forward, case.run_step

    def forced(run: Callable[[], Any]) -> Callable[[], Any]:
        def run_forced() -> Any:
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                return run()

        return run_forced

    try:
        forced(step)()
    except RuntimeError as error:
        case.on_gpu["softmax"] = f"torch's choice; {FLASH} refuses: {_short(error)}"
        return
    case.on_gpu["softmax"] = FLASH
    case.run_forward, case.run_step = None if forward is None else forced(forward), forced(step)


def gemm_name(device: torch.device, dtype: torch.dtype) -> str:
    """Return the matrix product that rates are of, in words."""
    return f"{_gemm_side(device)}-cubed {str(dtype).removeprefix('torch.')} matrix product"


def _gemm_side(device: torch.device) -> int:
    return GPU_GEMM_SIDE if device.type == "cuda" else GEMM_SIDE


def take_turns(
    cases: Sequence[Case],
    turns: int,
    device: torch.device,
    on_case: Callable[[Case], None],
    graphs: bool = True,
) -> list[float]:
    """Time all cases in turn; return the GEMM rate of every turn in FLOP/s.

    `turns` turns follow a warm-up. Slow cases run once, without warm-up.

    on_case: called before a case has its turn, len(cases) x (turns + 1) times in all, also for slow ones that
        are passed over.
    graphs: whether short calls on a GPU are replayed as CUDA graphs.
    """
    side = _gemm_side(device)
    square = torch.randn(side, side).to(device, cases[0].dtype)
    clock: Clock = GpuClock(device) if device.type == "cuda" else HostClock()
    rates: list[float] = []
    for turn in range(turns + 1):
        seconds = statistics.median(clock.time(lambda: square @ square)[0] for _ in range(3))
        rates.append(2 * side**3 / seconds)
        for case in cases:
            on_case(case)
            if case.step and case.step[-1] > SLOW:
                continue
            forward = clock.time(case.run_forward) if case.run_forward else None
            step = clock.time(case.run_step)
            if turn > 0 or step[0] > SLOW:  # the first turn warms up
                _note(case, forward, step)
                case.gemm.append(case.flops / rates[-1])
            elif isinstance(clock, GpuClock):
                _prepare(case, clock, graphs)
    return rates[1:]


def _note(case: Case, forward: tuple[float, float] | None, step: tuple[float, float]) -> None:
    if forward is not None:
        case.forward.append(forward[0])
        case.forward_cpu.append(forward[1])
    case.step.append(step[0])
    case.step_cpu.append(step[1])


def _prepare(case: Case, clock: GpuClock, graphs: bool) -> None:
    """Replace the short calls of a case by CUDA graphs, after the warm-up."""
    case.on_gpu["step_runs"] = "eagerly"
    if graphs and clock.time(case.run_step)[0] < SMALL:
        case.run_step, case.on_gpu["step_runs"] = clock.replayed(case.run_step)
    if case.run_forward is None:
        return
    case.on_gpu["forward_runs"] = "eagerly"
    if graphs and clock.time(case.run_forward)[0] < SMALL:
        case.run_forward, case.on_gpu["forward_runs"] = clock.replayed(case.run_forward)


def seconds_once(run: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds of one call that cannot be repeated.

    The device waits for nothing before it.
    """
    if device.type != "cuda":
        return HostClock().time(run)[0]
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1e3


class Clock(Protocol):
    """Times a call."""

    def time(self, run: Callable[[], Any]) -> tuple[float, float]:
        """Return the seconds of a call, and those of processor time of all threads."""


class HostClock:
    """The clock of a CPU."""

    def time(self, run: Callable[[], Any]) -> tuple[float, float]:
        """Return the seconds of one call."""
        start, cpu = time.perf_counter(), time.process_time()
        run()
        return time.perf_counter() - start, time.process_time() - cpu


class GpuClock:
    """The clock of a GPU: CUDA events around each of several calls, which find the cache cold.

    A call that launches more slowly than its kernels run lasts as long as its launches.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._cold = torch.empty(_COLD_BYTES, dtype=torch.int8, device=device)

    def time(self, run: Callable[[], Any]) -> tuple[float, float]:
        """Return the median seconds of calls, as many as take _REPEATED seconds together."""
        cpu = time.process_time()
        found = self._events(run, 1)
        more = min(20, int(_REPEATED / max(found[0], 1e-6)))
        if more > 1:
            found = self._events(run, more)
        return statistics.median(found), (time.process_time() - cpu) / (len(found) + (more > 1))

    def _events(self, run: Callable[[], Any], count: int) -> list[float]:
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for start, end in pairs:
            self._cold.zero_()
            start.record()
            run()
            end.record()
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(end) / 1e3 for start, end in pairs]

    def replayed(self, run: Callable[[], Any]) -> tuple[Callable[[], Any], str]:
        """Return a call as a CUDA graph's replay, or itself, and how it runs in words."""
        try:
            return self._captured(run), GRAPH
        except RuntimeError as error:
            torch.cuda.synchronize(self.device)
            return run, f"eagerly; no CUDA graph: {_short(error)}"

    def _captured(self, run: Callable[[], Any]) -> Callable[[], Any]:
        graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):  # also where a capture fails, the stream before is current again
            for _ in range(3):
                run()
            torch.cuda.synchronize(self.device)
            with torch.cuda.graph(graph, stream=side):
                run()
        torch.cuda.synchronize(self.device)
        return graph.replay


def _short(error: Exception) -> str:
    """Return the first sentence of an error of torch."""
    return " ".join(str(error).split()).split(". ")[0][:120] or type(error).__name__


def spread(seconds: Sequence[float]) -> float:
    """Return the interquartile range of two times or more."""
    low, _, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else (0.0, 0.0, 0.0)
    return high - low


def ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """Median of a/b turn by turn; where one of them ran once only, of medians."""
    if len(a) == len(b):
        return statistics.median(x / y for x, y in zip(a, b, strict=True))
    return statistics.median(a) / statistics.median(b)


def slope(tokens: Sequence[int], seconds: Sequence[float]) -> float:
    """Least-squares slope of log time over log tokens: 1 is linear, 2 quadratic."""
    x, y = [math.log(n) for n in tokens], [math.log(s) for s in seconds]
    return statistics.linear_regression(x, y).slope
