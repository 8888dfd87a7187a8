"""The compiled form of MHLA's N x N matrix: numbers, memory, threads, and machines without a compiler."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mhla_lightning.attention.context import Context
from mhla_lightning.attention.mhla import dense
from mhla_lightning.attention.mhla.bidirectional import ReluMHLA
from mhla_lightning.attention.mhla.cpu import building, short_rows
from mhla_lightning.attention.mhla.grid import BlockGrid
from mhla_lightning.attention.mhla.operator import MHLA, MHLAOptions
from tests.helpers.compiler import needs_a_compiler

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]  # q, k, v and the mixing matrix

# grid, blocks, batch, heads, channels of k and of v, a matrix a head
CASES = {
    "square": ((8, 8), (4, 4), 3, 2, 64, 64, False),
    "short blocks": ((7, 9), (3, 5), 2, 3, 5, 33, True),
    "video": ((3, 5, 4), (2, 3, 2), 2, 1, 16, 4, False),
    "text": ((3,), (3,), 1, 2, 6, 1, True),
    "several chunks of queries": ((24, 24), (12, 12), 1, 2, 20, 17, False),
}


@pytest.fixture(autouse=True)
def _compiler() -> None:
    needs_a_compiler()


def _case(name: str) -> tuple[BlockGrid, Inputs, Tensor]:
    """Return float32 inputs whose q, k and v are views of one tensor where they can be, as a layer's are."""
    size, blocks, batch, heads, dim, dim_v, by_head = CASES[name]
    generator, grid = torch.Generator().manual_seed(3), BlockGrid(size, blocks)
    packed = torch.randn(batch, grid.tokens, 2, heads, dim, generator=generator)
    v = torch.randn(batch, heads, grid.tokens, dim_v, generator=generator).transpose(1, 2)
    q, k = (x.detach().requires_grad_() for x in packed.unbind(2))
    count = grid.num_blocks
    mixing = torch.rand((heads, count, count) if by_head else (count, count), generator=generator)
    grad = torch.randn(batch, grid.tokens, heads, dim_v, generator=generator)
    return grid, (q, k, v.detach().requires_grad_(), mixing.requires_grad_()), grad


def _off(ours: Tensor, exact: Tensor) -> float:
    return ((ours.double() - exact).abs().max() / exact.abs().max()).item()


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("offset", [0.0, 0.25])
@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_are_those_of_float64(name: str, offset: float, normalize: bool) -> None:
    grid, inputs, grad = _case(name)
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    exact = ReluMHLA(grid, offset, normalize, 1e-6, torch.float64).plain(*doubles)
    settings = ReluMHLA(grid, offset, normalize, 1e-6, torch.float32)
    out = dense.dense_on_cpu(*inputs, settings)
    assert _off(out, exact) <= 2e-6
    with torch.no_grad():
        assert torch.equal(dense.dense_on_cpu(*inputs, settings), out)
    ours, right = torch.autograd.grad(out, inputs, grad), torch.autograd.grad(exact, doubles, grad.double())
    for mine, its in zip(ours, right, strict=True):
        assert _off(mine, its) <= 4e-6


def test_numbers_do_not_depend_on_the_threads() -> None:
    grid, inputs, grad = _case("short blocks")
    settings = ReluMHLA(grid, 0.0, True, 1e-6, torch.float32)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            out = dense.dense_on_cpu(*inputs, settings)
            results.append([out, *torch.autograd.grad(out, inputs, grad)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_a_number_that_is_none_reaches_the_outputs_that_read_it() -> None:
    grid, (q, k, v, mixing), _ = _case("square")
    settings = ReluMHLA(grid, 0.0, True, 1e-6, torch.float32)
    with torch.no_grad():
        q[0, 5, 1, 7] = float("nan")
        v[2, 9, 0, 3] = float("nan")
        lost = dense.dense_on_cpu(q, k, v, mixing, settings).isnan()
    assert lost[0, 5, 1].all()
    assert lost[2, :, 0, 3].all()
    assert lost.sum() == 64 + 64  # the channels of one token, and the tokens of one channel


def test_tokens_of_bfloat16_have_sums_in_float32() -> None:
    grid, inputs, grad = _case("square")
    settings = ReluMHLA(grid, 0.0, True, 1e-6, torch.float32)
    q, k, v, mixing = (x.detach().bfloat16().requires_grad_() for x in inputs)
    halves = (q, k, v, mixing)
    q, k, v, mixing = (x.detach().float().requires_grad_() for x in halves)
    singles = (q, k, v, mixing)
    out, same = dense.dense_on_cpu(*halves, settings), dense.dense_on_cpu(*singles, settings)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, same.bfloat16())
    gradients = torch.autograd.grad(out, halves, grad.bfloat16())
    assert [x.dtype for x in gradients] == [torch.bfloat16] * 4


def test_torch_knows_shapes_and_flops() -> None:
    grid, (q, k, v, mixing), _ = _case("short blocks")
    block_of = grid.block_of_token
    out, sums = torch.ops.mhla.short_rows(q, k, v, mixing, block_of, 0.0, 1e-6, True)
    given = (out, q, k, v, mixing, block_of, out, sums, 0.0, True)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.mhla.short_rows, (q, k, v, mixing, block_of, 0.0, 1e-6, True), test_utils=checks
    )
    torch.library.opcheck(torch.ops.mhla.short_rows_backward, given, test_utils=checks)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        torch.ops.mhla.short_rows(q, k, v, mixing, block_of, 0.0, 1e-6, True)
        torch.ops.mhla.short_rows_backward(*given)
    pairs = 2 * 2 * 3 * 63**2
    assert counter.get_total_flops() == pairs * (5 + 33) + pairs * (3 * 5 + 2 * 33)


@pytest.mark.parametrize(("kernel", "calls"), [("auto", 1), ("torch", 0)])
def test_the_option_kernel_can_leave_it_out(kernel: str, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = []
    monkeypatch.setattr(short_rows, "serves", lambda *_: counted.append(True))
    options = MHLAOptions(blocks=4, kernel=kernel)
    operator = MHLA(heads=2, dim_k=8, dim_v=8, grid=(8, 8), options=options)
    q = torch.randn(1, 64, 2, 8)
    operator.attend(q, q, q, Context())
    assert len(counted) == calls


def test_it_takes_real_tensors_of_float32_alone() -> None:
    grid, (q, *_), _ = _case("square")
    singles, doubles = (ReluMHLA(grid, 0.0, True, 1e-6, x) for x in (torch.float32, torch.float64))
    assert short_rows.serves(q, singles)
    assert not short_rows.serves(q, doubles)
    assert not short_rows.serves(q.to("meta"), singles)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of nobody yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "mhla_lightning"


def test_a_machine_without_a_compiler_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert building.loaded.__wrapped__() == "no C++ compiler was found: none of CXX, g++, clang++, c++"


def test_a_compiler_that_fails_is_named_once_and_leaves_nothing(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "false")
    with caplog.at_level(logging.INFO):
        reason = building.loaded.__wrapped__()
    assert reason is not None
    assert reason.startswith("dense.cpp was not compiled by /")
    assert "torch's own operations" in caplog.text
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize("owner", ["another user", "this user, and everybody may write"])
def test_code_that_others_may_have_written_is_not_loaded(
    owner: str, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere.mkdir()
    compiler = building.find_compiler()
    assert compiler is not None
    building._place(compiler).write_bytes(b"code of somebody")
    if owner == "another user":
        monkeypatch.setattr(os, "getuid", lambda: elsewhere.stat().st_uid + 1)
    else:
        elsewhere.chmod(0o777)
    monkeypatch.setattr(torch.ops, "load_library", lambda path: pytest.fail(f"{path} was loaded"))
    reason = building.loaded.__wrapped__()
    assert reason is not None
    assert "belongs to another user, or others may write to it" in reason
