"""Blocks on a token grid, and the matrix that mixes them."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from mhla_lightning.attention import BlockGrid, MixingInit, MixingMatrix, build_attention, initial_mixing
from mhla_lightning.attention.mhla.relative import average_by_offset, expand_relative, offset_deviation
from tests.helpers.errors import refused

GRIDS = [
    ((16,), 4),
    ((22,), 3),
    ((4, 4), 2),
    ((7, 10), (3, 3)),
    ((4, 6, 2), (2, 3, 2)),
    ((5, 7, 3), (2, 3, 3)),
    ((1, 1), 1),
]


@pytest.mark.parametrize(("grid", "blocks"), GRIDS, ids=str)
def test_blocks_and_back(grid: tuple[int, ...], blocks: int | tuple[int, ...]) -> None:
    b = BlockGrid(grid, blocks)
    x = torch.randn(2, 3, b.tokens, 4)
    assert b.to_blocks(x).shape == (2, 3, b.num_blocks, b.tokens_per_block, 4)
    assert torch.equal(b.from_blocks(b.to_blocks(x)), x)
    assert (b.mask is None) == b.even
    held = b.num_blocks * b.tokens_per_block if b.mask is None else int(b.mask.sum())
    assert held == b.tokens == math.prod(grid)


@pytest.mark.parametrize(("grid", "blocks"), GRIDS, ids=str)
def test_block_order_is_row_major_blocks_of_row_major_tokens(
    grid: tuple[int, ...], blocks: int | tuple[int, ...]
) -> None:
    """Against a loop over the tokens of every block."""
    b = BlockGrid(grid, blocks)
    numbers = torch.arange(b.tokens).view(grid)
    placed = b.to_blocks(torch.arange(1, b.tokens + 1).view(-1, 1)).squeeze(-1)
    expected = []
    for corner in torch.cartesian_prod(*(torch.arange(n) for n in b.blocks)).view(b.num_blocks, -1):
        for place in torch.cartesian_prod(*(torch.arange(n) for n in b.block_size)).view(
            b.tokens_per_block, -1
        ):
            where = [int(c) * size + int(p) for c, p, size in zip(corner, place, b.block_size, strict=True)]
            inside = all(w < n for w, n in zip(where, grid, strict=True))
            expected.append(int(numbers[tuple(where)]) + 1 if inside else 0)
    assert placed.flatten().tolist() == expected
    inside_block = {int(t) - 1: i // b.tokens_per_block for i, t in enumerate(expected) if t}
    assert b.block_of_token.tolist() == [inside_block[t] for t in range(b.tokens)]


def test_distances_are_euclidean_on_the_block_grid() -> None:
    d = BlockGrid((4, 6), (2, 3)).distances()
    assert d[0].tolist() == pytest.approx([0, 1, 2, 1, math.sqrt(2), math.sqrt(5)])
    assert torch.equal(d, d.T)


@pytest.mark.parametrize(
    ("tokens", "blocks", "near"),
    [(10, 9, [5, 10]), (10, 11, [10]), (16, 9, [8, 16]), (7, 5, [4, 7])],
)
def test_a_count_that_does_not_fit_names_the_nearest(tokens: int, blocks: int, near: list[int]) -> None:
    with refused("blocks") as error:
        BlockGrid((tokens,), blocks)
    assert str(error.value).endswith(" and ".join(str(count) for count in near))
    for count in near:
        assert BlockGrid((tokens,), count).num_blocks == count


def test_causal_initialisations_are_what_the_design_says() -> None:
    local, decaying = (
        MixingMatrix(4, init, causal=True, init_options=MixingInit(exp_sigma=0.5)).matrix()
        for init in ("causal_local", "causal_exp")
    )
    rows = [
        [1.0],
        [1.0, 1e-3],
        [1.0, 0.5, 1e-3],
        [1.0, 2 / 3, 1 / 3, 1e-3],
    ]  # 1 - (i - b) / max(i, 1) by distance, at least 1e-3
    for i, row in enumerate(rows):
        expected = torch.tensor(row[::-1]) / sum(row)
        torch.testing.assert_close(local[i], torch.nn.functional.pad(expected, (0, 3 - i)))
        torch.testing.assert_close(decaying[i, : i + 1], torch.exp(-torch.arange(i, -1, -1.0) / 0.5))
    torch.testing.assert_close(
        MixingMatrix(4, "causal_exp", causal=True).weight[3], torch.exp(-torch.arange(3, -1, -1.0))
    )


def test_the_relative_form_serves_any_number_of_blocks() -> None:
    mixing = MixingMatrix(3, "causal_exp", causal=True, heads=2, form="relative")
    assert mixing.weight.shape == (2, 3)
    with torch.no_grad():
        mixing.weight.copy_(torch.tensor([[0.9, 0.5, 0.1], [-1.0, 2.0, 0.3]]))
    mixing.project_()
    w = [[0.9, 0.5, 0.1], [0.0, 1.0, 0.3]]
    for head, (own, near, far) in enumerate(w):
        expected = [
            [own, 0, 0, 0, 0],
            [near, own, 0, 0, 0],
            [far, near, own, 0, 0],
            [far, far, near, own, 0],
            [far, far, far, near, own],
        ]
        torch.testing.assert_close(mixing.matrix(5)[head], torch.tensor(expected))
    assert (MixingMatrix(4, "causal_uniform", causal=True, heads=2, form="relative").weight == 1).all()
    torch.testing.assert_close(
        MixingMatrix(3, "causal_local", causal=True, form="relative").weight, torch.tensor([[1.0, 0.5, 1e-3]])
    )


@pytest.mark.parametrize(
    ("own", "other"), [((4,), (7,)), ((2, 3), (3, 2)), ((3, 2), (1, 5)), ((2, 1, 3), (3, 2, 2))]
)
def test_the_relative_form_has_one_weight_per_offset(own: tuple[int, ...], other: tuple[int, ...]) -> None:
    mixing = MixingMatrix(own, heads=2, form="relative")
    assert mixing.weight.shape == (2, math.prod(2 * n - 1 for n in own))
    absolute = MixingMatrix(own).matrix().tolist()
    by_offset: dict[tuple[int, ...], list[float]] = {}
    places = list(itertools.product(*map(range, own)))
    for (i, query), (j, key) in itertools.product(enumerate(places), repeat=2):
        by_offset.setdefault(offset(query, key, own), []).append(absolute[i][j])
    for (i, query), (j, key) in itertools.product(enumerate(places), repeat=2):
        found = by_offset[offset(query, key, own)]
        assert float(mixing.matrix()[1, i, j].detach()) == pytest.approx(sum(found) / len(found), rel=1e-6)
    with torch.no_grad():
        mixing.weight.copy_(torch.rand(mixing.weight.shape))
    table = dict(
        zip(itertools.product(*(range(1 - n, n) for n in own)), mixing.weight[0].tolist(), strict=True)
    )
    matrix = mixing.matrix(other)[0]
    places = list(itertools.product(*map(range, other)))
    for (i, query), (j, key) in itertools.product(enumerate(places), repeat=2):
        assert matrix[i][j] == table[offset(query, key, own)]
    with refused("blocks"):
        mixing.matrix((*other, 2))


def offset(query: tuple[int, ...], key: tuple[int, ...], own: tuple[int, ...]) -> tuple[int, ...]:
    """By hand: query minus key along each axis, no farther than the own blocks reach."""
    return tuple(max(1 - n, min(n - 1, a - b)) for a, b, n in zip(query, key, own, strict=True))


def test_the_average_by_offset_reports_how_far_entries_are_from_it() -> None:
    matrix = torch.tensor([[0.5, 0.25], [0.75, 1.0]])
    weights = average_by_offset(matrix, (2,))
    assert weights.tolist() == [[0.25, 0.75, 0.75]]  # key to the right, own, key to the left
    assert offset_deviation(matrix, weights, (2,)) == 0.25
    for of_one in (expand_relative(weights, (2,), (2,)), expand_relative(weights, (2,), (5,))):
        blocks = of_one.shape[-1:]
        assert offset_deviation(of_one, average_by_offset(of_one, blocks), blocks) == 0


@pytest.mark.parametrize(
    ("name", "value"), [("exp_sigma", 0), ("exp_sigma", float("nan")), ("local_thres", -1), ("value", "a")]
)
def test_options_that_make_no_matrix_are_refused(name: str, value: Any) -> None:
    with refused(f"mix_init_options.{name}"):
        MixingInit.of({name: value})


def test_a_plan_builds_the_relative_form_without_data() -> None:
    with torch.device("meta"):
        assert MixingMatrix((2, 3), heads=2, form="relative").weight.shape == (2, 15)


@pytest.mark.parametrize("init", ["local_row", "uniform", "causal_uniform"])
@pytest.mark.parametrize("counts", [[1], [2], [5], [4, 4], [2, 3, 4]], ids=str)
def test_rows_sum_to_one(init: str, counts: list[int]) -> None:
    weight = MixingMatrix(counts, init, causal=init.startswith("causal")).matrix()
    torch.testing.assert_close(weight.sum(1), torch.ones(len(weight)))


def test_options_of_the_initialisations_reach_them() -> None:
    d = BlockGrid((4, 4), block_size=1).distances()
    assert torch.equal(initial_mixing(d, "const", value=0.25), torch.full_like(d, 0.25))
    near, far = (initial_mixing(d, "exp", exp_sigma=s) for s in (0.5, 5.0))
    assert near[0, 0] > far[0, 0]
    assert (initial_mixing(d, "local", local_thres=1.0) > 0).sum() < (
        initial_mixing(d, "local", local_thres=1.5) > 0
    ).sum()


def test_projection_restores_range_and_triangle() -> None:
    mixing = MixingMatrix(5, "causal_uniform", causal=True)
    with torch.no_grad():
        mixing.weight.uniform_(-2, 2)
    assert (mixing.matrix().triu(1) == 0).all()  # the forward masks by itself
    mixing.project_()
    assert mixing.weight.min() >= 0
    assert mixing.weight.max() <= 1
    assert (mixing.weight.triu(1) == 0).all()
    free = MixingMatrix(5, "uniform", clamp=None)
    with torch.no_grad():
        free.weight.fill_(7.0)
    free.project_()
    assert (free.weight == 7).all()


def test_frozen_and_per_head() -> None:
    frozen = MixingMatrix([2, 2], learnable=False, heads=3)
    assert frozen.weight.shape == (3, 4, 4)
    assert not frozen.weight.requires_grad
    assert torch.equal(frozen.weight[0], MixingMatrix([2, 2]).weight)


def test_a_causal_matrix_serves_fewer_blocks_and_every_other_needs_its_own() -> None:
    assert MixingMatrix(8, "causal_uniform", causal=True).matrix(3).shape == (3, 3)
    with refused("blocks"):
        MixingMatrix(8).matrix(3)
    with refused("blocks"):
        MixingMatrix(8, "causal_uniform", causal=True).matrix(9)


@pytest.mark.parametrize(
    "entry",
    ["softmax", "linear", {"name": "mhla", "block_size": 2, "mix_form": "relative"}],
    ids=["softmax", "linear", "relative"],
)
def test_a_grid_inside_a_larger_masked_one_gives_its_own_numbers(entry: Any) -> None:
    """Operators need nothing but the mask; layers around them do, so batches have one grid (docs/data.md)."""
    grid, full, heads, dim = (5, 6), (8, 7), 2, 4
    operator = build_attention(entry, heads=heads, dim_k=dim, dim_v=dim, grid=grid)
    q, k, v = (torch.randn(2, 30, heads, dim) for _ in range(3))
    inside = torch.zeros(full, dtype=torch.bool)
    inside[: grid[0], : grid[1]] = True
    mask = inside.flatten()
    padded = [torch.full((2, 56, heads, dim), 7.0) for _ in range(3)]
    for wide, narrow in zip(padded, (q, k, v), strict=True):
        wide[:, mask] = narrow
    out = operator(*padded, grid=full, mask=mask.expand(2, -1))
    torch.testing.assert_close(out[:, mask], operator(q, k, v, grid=grid))
    assert not out[:, ~mask].any()
