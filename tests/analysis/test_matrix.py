"""The attention matrix of each kind against its equation, written out pair by pair."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mhla_lightning.analysis.measures import numerical_rank, singular_values
from mhla_lightning.attention import MHLA, Attention, Context, Softmax, build_attention
from mhla_lightning.attention.matrix import attention_matrix
from mhla_lightning.attention.mhla import CausalMHLA
from tests.helpers.errors import refused

HEADS, DIM_K, DIM_V = 2, 4, 6
GRID, BLOCK = (3, 5), (2, 2)  # the last blocks of both axes are short
ROW, CHUNK = 17, 4
DOCUMENTS = [0] * 7 + [1] + [2] * 7 + [-1] * 2  # one of them has one token, and the row ends in padding
EPS = 1e-6


def operator(entry: dict[str, Any], grid: tuple[int, ...], causal: bool) -> Attention:
    """An operator whose mixing weights are all different."""
    torch.manual_seed(0)
    built = build_attention(entry, heads=HEADS, dim_k=DIM_K, dim_v=DIM_V, grid=grid, causal=causal)
    for parameter in built.parameters():
        torch.nn.init.uniform_(parameter, 0.1, 1.0)
    return built


def inputs(tokens: int, batch: int = 2) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(batch, tokens, HEADS, dim, generator=draw) for dim in (DIM_K, DIM_K, DIM_V)]


def turned(x: Tensor) -> Tensor:
    """A rotary: each token's first two channels are turned by its position."""
    angle = torch.arange(x.shape[1], dtype=x.dtype)[:, None] / 3
    first, second = x[..., 0], x[..., 1]
    pair = [first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()]
    return torch.cat([torch.stack(pair, -1), x[..., 2:]], -1)


def directly(weigh: Any, seen: Any, tokens: int) -> Tensor:
    """(batch, heads, tokens, tokens), entry by entry."""
    matrix = torch.zeros(2, HEADS, tokens, tokens, dtype=torch.float64)
    for b in range(2):
        for h in range(HEADS):
            for i in range(tokens):
                for j in range(tokens):
                    if seen(b, i, j):
                        matrix[b, h, i, j] = weigh(b, h, i, j)
    return matrix


def block(token: int) -> int:
    row, column = divmod(token, GRID[1])
    return row // BLOCK[0] * math.ceil(GRID[1] / BLOCK[1]) + column // BLOCK[1]


@pytest.mark.parametrize("rotary", [None, turned], ids=["no rotary", "rotary"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("name", ["softmax", "linear", "mhla"])
def test_a_bidirectional_matrix_is_its_equation(name: str, padded: bool, rotary: Any) -> None:
    tokens = math.prod(GRID)
    attention = operator({"name": name, **({"block_size": BLOCK} if name == "mhla" else {})}, GRID, False)
    q, k, v = inputs(tokens)
    mask = torch.ones(2, tokens, dtype=torch.bool)
    mask[0, 12:] = False
    context = Context(grid=GRID, mask=mask if padded else None, rotary=rotary)
    found = attention_matrix(attention, q, k, v, context)
    turn = rotary or (lambda x: x)
    q, k = q.double(), k.double()

    def seen(b: int, i: int, j: int) -> bool:
        return not padded or bool(mask[b, i] and mask[b, j])

    if name == "softmax":
        q, k = turn(q), turn(k)
        sums = directly(lambda b, h, i, j: (q[b, i, h] @ k[b, j, h] / DIM_K**0.5).exp(), seen, tokens)
        norms = sums.sum(-1, keepdim=True)
    else:
        offset = EPS if name == "mhla" else 0.0
        weights = attention.mixing.matrix() if isinstance(attention, MHLA) else torch.ones(1, 1)

        def weight(i: int, j: int) -> Tensor:
            return weights[block(i), block(j)].double() if name == "mhla" else weights[0, 0]

        q, k = q.relu() + offset, k.relu() + offset
        norms = directly(lambda b, h, i, j: weight(i, j) * (q[b, i, h] @ k[b, j, h]), seen, tokens)
        norms = norms.sum(-1, keepdim=True) + EPS
        q, k = turn(q), turn(k)
        sums = directly(lambda b, h, i, j: weight(i, j) * (q[b, i, h] @ k[b, j, h]), seen, tokens)
    expected = torch.where(norms > 0, sums / norms, 0)
    torch.testing.assert_close(found, expected.detach(), atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
@pytest.mark.parametrize("name", ["softmax", "linear", "mhla"])
def test_a_causal_matrix_is_its_equation(name: str, packed: bool) -> None:
    entry: dict[str, Any] = {"name": name}
    if name != "softmax":
        entry["chunk_size"] = CHUNK
    if name == "mhla":
        entry |= {"max_chunks": 5, "mix_per_head": True}
    attention = operator(entry, (ROW,), True)
    q, k, v = inputs(ROW)
    documents = torch.tensor([DOCUMENTS, [0] * ROW]) if packed else torch.zeros(2, ROW, dtype=torch.int64)
    real = documents >= 0
    context = Context(documents=documents, mask=real) if packed else Context()
    found = attention_matrix(attention, q, k, v, context)
    place = torch.tensor([[row[:i].count(row[i]) for i in range(ROW)] for row in documents.tolist()])
    q, k = q.double(), k.double()

    def seen(b: int, i: int, j: int) -> bool:
        return j <= i and bool(real[b, i]) and bool(documents[b, i] == documents[b, j])

    if name == "softmax":
        sums = directly(lambda b, h, i, j: (q[b, i, h] @ k[b, j, h] / DIM_K**0.5).exp(), seen, ROW)
        expected = sums / sums.sum(-1, keepdim=True).clamp_min(1e-300)
    else:
        m = attention.mixing().double() if isinstance(attention, CausalMHLA) else torch.ones(HEADS, 5, 5)
        q, k, chunk = q.relu(), k.relu(), place // CHUNK

        def weigh(b: int, h: int, i: int, j: int) -> Tensor:
            return m[h, chunk[b, i], chunk[b, j]] * (q[b, i, h] @ k[b, j, h]) / DIM_K**0.5

        expected = directly(weigh, seen, ROW)
    torch.testing.assert_close(found, expected.detach(), atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize(
    ("grid", "block_size", "bound"),
    [
        ((5, 7), (2, 3), 27),
        ((4, 6), (2, 3), 16),
        ((13,), (4,), 13),
        ((2, 4, 4), (2, 2, 2), 16),
        ((6,), (6,), 4),
    ],
    ids=str,
)
def test_no_rank_exceeds_the_bound_of_the_paper(grid: Any, block_size: Any, bound: int) -> None:
    """rank <= sum over blocks of min(n_b, d); random features reach it."""
    tokens = math.prod(grid)
    attention = operator({"name": "mhla", "block_size": block_size, "feature_map": "identity"}, grid, False)
    q, k, v = inputs(tokens)
    ranks = numerical_rank(singular_values(attention_matrix(attention, q, k, v, Context(grid=grid))))
    assert attention.rank_bound(grid, DIM_K) == bound
    assert ranks.max() == bound
    linear = operator({"name": "linear", "feature_map": "identity"}, grid, False)
    ranks = numerical_rank(singular_values(attention_matrix(linear, q, k, v, Context(grid=grid))))
    assert linear.rank_bound(grid, DIM_K) == min(tokens, DIM_K) == ranks.max()


class Doubles(Softmax):
    """Not linear in v."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        return super().attend(q, k, v * v.abs(), context)


def test_an_operator_that_is_not_linear_in_v_has_no_matrix() -> None:
    q, k, v = inputs(7)
    with refused("name"):
        attention_matrix(Doubles(heads=HEADS, dim_k=DIM_K, dim_v=DIM_V), q, k, v, Context())


def test_heads_that_share_keys_have_a_matrix_each() -> None:
    attention = operator({"name": "softmax"}, (ROW,), True)
    q, k, v = inputs(ROW)
    found = attention_matrix(attention, q, k[:, :, :1], v[:, :, :1], Context())
    k, v = (x[:, :, :1].expand(-1, -1, HEADS, -1) for x in (k, v))
    torch.testing.assert_close(found, attention_matrix(attention, q, k, v, Context()))
