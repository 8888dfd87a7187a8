"""MHLA of short rows of small blocks, which a CPU computes with the N x N matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mhla_lightning.attention.mhla import dense, fused
from mhla_lightning.attention.mhla.bidirectional import ReluMHLA
from mhla_lightning.attention.mhla.grid import BlockGrid
from tests.helpers.compiler import needs_a_compiler

CASES = {
    "even": ((8, 8), (4, 4), 3, (8, 6), False),
    "short blocks, by head": ((7, 9), (3, 5), 4, (5, 8), True),
    "video": ((3, 5, 4), (2, 3, 2), 7, (4, 4), False),
    "text": ((13,), (5,), 1, (16, 16), True),
}


Inputs = tuple[Tensor, Tensor, Tensor, Tensor]  # q, k, v and the mixing matrix


def _inputs(case: str, dtype: torch.dtype) -> tuple[BlockGrid, Inputs, Tensor]:
    size, blocks, batch, (dim_k, dim_v), by_head = CASES[case]
    generator = torch.Generator().manual_seed(7)
    grid = BlockGrid(size, blocks)
    shapes = [(batch, grid.tokens, 2, dim) for dim in (dim_k, dim_k, dim_v)]
    q, k, v = (torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes)
    matrices = (2, grid.num_blocks, grid.num_blocks) if by_head else (grid.num_blocks, grid.num_blocks)
    mixing = torch.rand(matrices, generator=generator, dtype=dtype).requires_grad_()
    grad = torch.randn(shapes[2], generator=generator, dtype=dtype)
    return grid, (q, k, v, mixing), grad


def _off(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference, relative to the largest value."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("at_once", [1, 2**10, 2**17])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("offset", [0.0, 0.25])
@pytest.mark.parametrize("case", CASES)
def test_it_equals_the_plain_form_with_all_gradients(
    case: str, offset: float, normalize: bool, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense, "SCORES", at_once)
    grid, inputs, grad = _inputs(case, torch.float64)
    settings = ReluMHLA(grid, offset, normalize, 1e-6, torch.float64)
    out, plain = dense.dense_on_cpu(*inputs, settings), settings.plain(*inputs)
    assert _off(out, plain) <= 1e-13
    with torch.no_grad():
        assert _off(dense.dense_on_cpu(*inputs, settings), plain) <= 1e-13
    ours, theirs = (torch.autograd.grad(x, inputs, grad) for x in (out, plain))
    for mine, right in zip(ours, theirs, strict=True):
        assert _off(mine, right) <= 1e-13


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_float32_is_as_near_to_float64_as_the_plain_form_is(case: str, compiled: bool) -> None:
    if compiled:
        needs_a_compiler()
    grid, inputs, grad = _inputs(case, torch.float64)
    exact = ReluMHLA(grid, 0.0, True, 1e-6, torch.float64).plain(*inputs)
    gradients = torch.autograd.grad(exact, inputs, grad)
    q, k, v, mixing = (x.detach().float().requires_grad_() for x in inputs)
    singles = (q, k, v, mixing)
    settings = ReluMHLA(grid, 0.0, True, 1e-6, torch.float32)
    errors = []
    for form in (
        dense.dense_on_cpu(*singles, settings, compiled=compiled),
        settings.plain(*singles),
    ):
        results = [form, *torch.autograd.grad(form, singles, grad.float())]
        pairs = zip(results, [exact, *gradients], strict=True)
        errors.append([_off(mine, right) for mine, right in pairs])
    for ours, plain in zip(*errors, strict=True):  # one sum of N terms instead of two shorter ones
        assert ours <= max(4 * plain, 1e-6)


def test_gradients_of_gradients_are_those_of_the_plain_form() -> None:
    grid, inputs, grad = _inputs("even", torch.float64)
    settings = ReluMHLA(grid, 0.25, True, 1e-6, torch.float64)
    second = []
    for form in (dense.dense_on_cpu(*inputs, settings), settings.plain(*inputs)):
        first = torch.autograd.grad(form, inputs, grad, create_graph=True)
        second.append(torch.autograd.grad(torch.cat([x.square().flatten() for x in first]).sum(), inputs))
    for mine, right in zip(*second, strict=True):
        assert _off(mine, right) <= 1e-12


@pytest.mark.parametrize(
    ("size", "blocks", "expected"),
    [
        ((8, 8), (4, 4), True),
        ((16, 16), (8, 8), True),
        ((8, 8), (2, 2), False),  # blocks^2 <= tokens
        ((64, 64), (16, 16), False),  # blocks^2 > tokens, and N^2 scores are dearer still
    ],
)
def test_it_is_taken_where_it_is_cheaper(
    size: tuple[int, int], blocks: tuple[int, int], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid, taken = BlockGrid(size, blocks), []
    q = torch.zeros(1, grid.tokens, 1, 64)
    monkeypatch.setattr(fused, "dense_on_cpu", lambda *_, **__: taken.append(True))
    fused.fused_mhla(q, q, q, torch.ones((grid.num_blocks,) * 2), grid, offset=0.0, dtype=torch.float32)
    assert bool(taken) == expected


@pytest.mark.parametrize("case", CASES)
def test_pairs_are_those_of_the_blocks(case: str) -> None:
    grid = BlockGrid(*CASES[case][:2])
    block = grid.block_of_token
    expected = block[:, None] * grid.num_blocks + block
    assert list(grid.pairs) == expected.flatten().tolist()


def test_blocks_of_pairs_are_kept_as_numbers_of_no_mode() -> None:
    """A model that a plan ran on fake tensors runs on real ones afterwards."""
    grid, inputs, _ = _inputs("even", torch.float32)
    settings = ReluMHLA(grid, 0.0, True, 1e-6, torch.float32)
    with torch._subclasses.FakeTensorMode() as mode, torch.no_grad():
        q, k, v, mixing = (mode.from_tensor(x) for x in inputs)
        fake = dense.dense_on_cpu(q, k, v, mixing, settings)
        assert fake.shape == inputs[2].shape
    assert type(dense.dense_on_cpu(*inputs, settings)) is Tensor


def test_a_compiler_takes_the_plain_form_without_a_graph_break() -> None:
    torch.compiler.reset()
    grid, inputs, grad = _inputs("short blocks, by head", torch.float64)

    def call(q: Tensor, k: Tensor, v: Tensor, mixing: Tensor) -> Tensor:
        return fused.fused_mhla(q, k, v, mixing, grid, offset=0.25, dtype=torch.float64)

    out, plain = torch.compile(call, fullgraph=True, backend="aot_eager")(*inputs), call(*inputs)
    assert _off(out, plain) <= 1e-13
    ours, theirs = (torch.autograd.grad(x, inputs, grad) for x in (out, plain))
    for mine, right in zip(ours, theirs, strict=True):
        assert _off(mine, right) <= 1e-13
