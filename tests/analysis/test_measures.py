"""The measures of a matrix against plain Python, and at the ends of their scales."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mhla_lightning.analysis.measures import TITLES, TokenPlaces, effective_rank, measure, singular_values

GRID, TOKENS = (3, 4), 12


def places(causal: bool) -> TokenPlaces:
    """Tokens of a 3 x 4 grid in blocks of 2 x 2."""
    positions = torch.cartesian_prod(torch.arange(3), torch.arange(4))
    return TokenPlaces(positions, positions[:, 0] // 2 * 2 + positions[:, 1] // 2, causal)


def random_matrix(causal: bool) -> Tensor:
    matrix = torch.randn(2, TOKENS, TOKENS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrix[1, 5] = 0  # a query that attends to nothing
    return matrix.tril() if causal else matrix


def plainly(matrix: list[list[float]], where: TokenPlaces) -> dict[str, float]:
    """The measures of a head in plain Python, but for the ranks."""
    spots, blocks = where.positions.tolist(), where.blocks.tolist()
    sums: dict[str, list[float]] = {name: [] for name in TITLES if "rank" not in name}
    for i, row in enumerate(matrix):
        total = sum(map(abs, row))
        sums["empty_rows"].append(float(total == 0))
        if total == 0:
            continue
        shares = [abs(value) / total for value in row]
        keys = range(i + 1) if where.causal else range(len(row))
        entropy = -sum(p * math.log(p) for p in shares if p > 0)
        far = sum(p * math.dist(spots[i], spots[j]) for j, p in enumerate(shares))
        uniform = sum(math.dist(spots[i], spots[j]) for j in keys) / len(keys)
        sums["entropy"].append(entropy)
        sums["distance"].append(far)
        sums["own_block"].append(sum(p for j, p in enumerate(shares) if blocks[i] == blocks[j]))
        sums["uniform_own_block"].append(sum(blocks[i] == blocks[j] for j in keys) / len(keys))
        if len(keys) > 1:
            sums["relative_entropy"].append(entropy / math.log(len(keys)))
            sums["locality"].append(1 - far / uniform)
    return {name: sum(values) / len(values) for name, values in sums.items()}


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_the_measures_are_those_of_plain_python(causal: bool) -> None:
    matrix, where = random_matrix(causal), places(causal)
    found = measure(matrix, where)
    assert list(found) == list(TITLES)
    for head in range(2):
        for name, value in plainly(matrix[head].tolist(), where).items():
            assert float(found[name][head]) == pytest.approx(value), name
        scaled = matrix[head] / matrix[head].abs().sum(-1, keepdim=True).clamp_min(1e-300)
        shares = torch.linalg.eigvalsh(scaled.mT @ scaled).clamp_min(0).sqrt()
        shares = shares / shares.sum()
        entropy = -sum(p * math.log(p) for p in shares.tolist() if p > 1e-9)
        assert float(found["effective_rank"][head]) == pytest.approx(math.exp(entropy), rel=1e-5)
        assert float(found["rank"][head]) == int(torch.linalg.matrix_rank(matrix[head]))


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_the_ends_of_the_scales(causal: bool) -> None:
    where = places(causal)
    own = measure(torch.eye(TOKENS, dtype=torch.float64)[None], where)
    assert [float(own[name]) for name in ("rank", "effective_rank", "relative_entropy", "locality")] == [
        TOKENS,
        pytest.approx(TOKENS),
        0,
        1,
    ]
    uniform = measure(where.visible().double()[None] * 7, where)
    assert float(uniform["relative_entropy"]) == pytest.approx(1)
    assert float(uniform["locality"]) == pytest.approx(0, abs=1e-12)
    assert float(uniform["own_block"]) == pytest.approx(float(uniform["uniform_own_block"]))
    if not causal:
        assert float(uniform["effective_rank"]) == pytest.approx(1)


def test_the_effective_rank_of_equal_singular_values_is_their_number() -> None:
    turn = torch.linalg.qr(
        torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    )[0]
    for count in (1, 3, 6):
        matrix = turn[:, :count] @ turn[:, :count].mT
        assert float(effective_rank(torch.linalg.svdvals(matrix))) == pytest.approx(count)
    # the scale of a row counts for nothing
    matrix = random_matrix(False)[0]
    scales = torch.arange(1, TOKENS + 1, dtype=torch.float64)[:, None]
    torch.testing.assert_close(singular_values(matrix), singular_values(scales * matrix))
