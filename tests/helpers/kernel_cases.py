"""Calls of the Triton kernels with their references, for the process of `interpreter.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from mhla_lightning.attention import BlockGrid, SelfAttention, build_attention, dense_mhla
from mhla_lightning.backbones.layers import GridRotation
from mhla_lightning.errors import UserError

EPS = 1e-3  # of features and normalizer; large enough to matter


@dataclass(frozen=True)
class KernelCase:
    """One call of the kernels.

    Attributes:
        form: `dense` or `blocks`.
        grid, size: tokens of the grid and of a block per axis.
        dim, dim_v: channels a head.
        heads: one for what is long.
        normalize, per_head, rotary, linear, float32_summaries: as in `triton_mhla`.
        whole: whether the dense backward is one kernel, as for a short row of a large batch.
        dtype: of the tokens.
    """

    form: str
    grid: tuple[int, ...]
    size: tuple[int, ...]
    dim: int
    dim_v: int
    heads: int = 2
    normalize: bool = True
    per_head: bool = False
    rotary: bool = False
    linear: bool = False
    float32_summaries: bool = False
    whole: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def label(self) -> str:
        """The name of the case in a test's id."""
        flags = [
            name
            for name in ("per_head", "rotary", "linear", "float32_summaries", "whole")
            if getattr(self, name)
        ]
        norm = "norm" if self.normalize else "none"
        dtype = str(self.dtype).removeprefix("torch.")
        return "-".join(
            [self.form, *map(str, self.grid), f"d{self.dim}", f"v{self.dim_v}", norm, dtype, *flags]
        )


def errors(case: KernelCase, device: str = "cpu") -> dict[str, float]:
    """Return the error of the output and of every gradient, relative to the reference's largest value.

    The kernels run on `device`, the reference on the CPU. A gradient through a normalizer is a difference of
    two terms, and may be much smaller than both: what counts is the larger one of it and of its part through
    the numerator.
    """
    from mhla_lightning.attention.mhla.triton import tiles
    from mhla_lightning.attention.mhla.triton.ops import triton_mhla

    torch.manual_seed(0)
    grid = BlockGrid(case.grid, block_size=case.size)
    width = 2 * case.dim + case.dim_v
    tokens = torch.randn(2, grid.tokens, case.heads, width).to(
        device, case.dtype
    )  # q, k and v share a row, as in a layer
    q, k, v = (x.detach().requires_grad_() for x in tokens.split([case.dim, case.dim, case.dim_v], -1))
    lead = (case.heads,) if case.per_head else ()
    mixing = None
    if not case.linear:
        mixing = torch.rand(*lead, grid.num_blocks, grid.num_blocks).to(device).requires_grad_()
    rotary = GridRotation(case.grid, case.dim, torch.device("cpu")) if case.rotary else None
    inputs = [x for x in (q, k, v, mixing) if x is not None]
    with mock.patch.object(tiles, "WHOLE_ROWS", 1 if case.whole else 2**31):
        out = triton_mhla(
            q,
            k,
            v,
            mixing,
            grid,
            offset=EPS,
            eps=EPS if case.normalize else None,
            table=None if rotary is None else rotary.turn_table().to(device),
            float32_summaries=case.float32_summaries,
            form=case.form,
        )
        grad = torch.randn(out.shape).to(case.dtype)
        got = [out, *torch.autograd.grad(out, inputs, grad.to(device))]
    wanted = [x.detach().cpu().double().requires_grad_() for x in inputs]
    reference = _reference(case, grid, rotary, *wanted)
    want = [reference, *torch.autograd.grad(reference, wanted, grad.double())]
    through = _reference(case, grid, rotary, *wanted, alone=True)
    parts = [reference, *torch.autograd.grad(through, wanted, grad.double())]
    names = ("out", "q", "k", "v", "mixing")
    pairs = zip(names, got, want, parts, strict=False)
    return {name: _relative(a.cpu(), b, alone) for name, a, b, alone in pairs}


def _relative(got: Tensor, want: Tensor, part: Tensor | None = None) -> float:
    got, want = got.detach().double(), want.detach()
    largest = want.abs().max() if part is None else torch.maximum(want.abs().max(), part.abs().max())
    return float((got - want).abs().max() / largest)


def _reference(
    case: KernelCase,
    grid: BlockGrid,
    rotary: Callable[[Tensor], Tensor] | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mixing: Tensor | None = None,
    *,
    alone: bool = False,
) -> Tensor:
    """Eq. 5 in float64; rotary turns the numerator only, and `alone` it has gradients."""
    q, k = torch.relu(q) + EPS, torch.relu(k) + EPS
    m = torch.ones(grid.num_blocks, grid.num_blocks).double() if mixing is None else mixing

    def read(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return dense_mhla(q, k, v, m, grid.block_of_token, normalizer="none").transpose(1, 2)

    out = read(q, k, v) if rotary is None else read(rotary(q), rotary(k), v)
    if not case.normalize:
        return out
    n = read(q, k, torch.ones_like(v[..., :1])) + EPS
    return out / (n.detach() if alone else n)


def check_operators() -> dict[str, str]:
    """Run torch.library.opcheck on every operator; return what each of its tests says."""
    from mhla_lightning.attention.mhla.triton import ops

    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 4, 1, 8, requires_grad=True) for _ in range(3))
    mixing = torch.rand(2, 2, requires_grad=True)
    table = torch.rand(4, 4, 2)
    dense = (q, k, v, mixing, (4,), (2,), EPS, EPS)
    blocks = (q, k, v, mixing, table, (4,), (2,), EPS, EPS, False)
    checked: list[tuple[Any, tuple[Any, ...]]] = [(ops.dense, dense), (ops.blocks, blocks)]
    with torch.no_grad():
        grad, plain, m = torch.ones(1, 4, 1, 8), [x.detach() for x in (q, k, v)], mixing.detach()
        saved = [x.detach() for x in ops.dense(*dense)]
        checked.append((ops.dense_backward, (grad, *plain, m, saved, (4,), (2,), EPS)))
        saved = [x.detach() for x in ops.blocks(*blocks)]
        checked.append((ops.blocks_backward, (grad, plain, m, table, saved, (4,), (2,), EPS, EPS, False)))
    found: dict[str, str] = {}
    for number, (operator, args) in enumerate(checked):
        results = torch.library.opcheck(operator, args, raise_exception=False)
        found |= {f"{number}.{test}": str(said) for test, said in results.items()}
    return found


def compiled_nodes(entry: dict[str, Any]) -> tuple[list[str], float]:
    """Compile an operator whole; return the graph's calls, and the error beside the uncompiled operator."""
    torch.manual_seed(0)
    operator = build_attention(entry, heads=1, dim_k=8, dim_v=8, grid=(4,))
    q, k, v = (torch.randn(1, 4, 1, 8) for _ in range(3))
    calls: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        calls.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    compiled = torch.compile(operator, fullgraph=True, backend=backend)
    with torch.no_grad():
        return calls, _relative(compiled(q, k, v), operator(q, k, v).double())


def refusals(entry: dict[str, Any], form: str) -> tuple[str, str]:
    """Return what a second derivative with frozen weights, and torch.func, are told by an operator."""
    from mhla_lightning.attention.mhla.triton import ops

    torch.manual_seed(0)
    layer = SelfAttention(8, 1, attention={**entry, "kernel": "triton"}, grid=(4,)).requires_grad_(False)
    x, w = torch.randn(1, 4, 8, requires_grad=True), torch.randn(1, 4, 8)
    said = []
    with mock.patch.object(ops, "dense_is_cheaper", return_value=form == "dense"):
        (slope,) = torch.autograd.grad((layer(x) * w).sum(), x, create_graph=True)
        for attempt in (lambda: slope.sum().backward(), lambda: torch.func.grad(lambda x: layer(x).sum())(x)):
            try:
                attempt()
                said.append("nothing")
            except (RuntimeError, UserError) as error:
                said.append(str(error))
    return said[0], said[1]


def operator_errors(entry: dict[str, Any]) -> dict[str, float]:
    """Return the error of an operator on kernels beside its torch path, with the gradient of its matrix."""
    torch.manual_seed(0)
    grid = (4, 5)
    built = {
        kernel: build_attention({**entry, "kernel": kernel}, heads=2, dim_k=8, dim_v=8, grid=grid)
        for kernel in ("triton", "torch")
    }
    built["torch"].load_state_dict(built["triton"].state_dict())
    q, k, v = (torch.randn(1, 20, 2, 8, requires_grad=True) for _ in range(3))
    results = {}
    for kernel, operator in built.items():
        out = operator(q, k, v)
        results[kernel] = [out, *torch.autograd.grad(out.square().sum(), [q, k, v, *operator.parameters()])]
    names = ("out", "q", "k", "v", "mixing")
    pairs = zip(names, results["triton"], results["torch"], strict=False)
    return {name: _relative(got, want.double()) for name, got, want in pairs}
