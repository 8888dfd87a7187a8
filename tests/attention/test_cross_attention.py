"""Cross-attention by MHLA against dense matrices: two grids, short blocks, padded texts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mhla_lightning.attention import (
    BlockGrid,
    CrossAttentionOptions,
    CrossMixingMatrix,
    MHLACrossAttention,
    cross_mhla,
    dense_cross_mhla,
    mhla,
)
from mhla_lightning.attention.mhla.cross import CROSS_NORMALIZERS, initial_cross_mixing
from mhla_lightning.attention.norm import RMSNorm
from mhla_lightning.tasks.projection import mixing_matrices
from tests.helpers.errors import refused

GRIDS = [((5, 7), (2, 3), (11,), (3,)), ((6, 4), (3, 2), (5, 3), (2, 2)), ((3, 4, 5), (2, 2, 2), (1,), (1,))]
"""Grid and block size of the queries, and of the keys."""
grids = pytest.mark.parametrize(("grid", "size", "key_grid", "key_size"), GRIDS, ids=str)


def drawn(*shape: int, seed: int = 0, low: float = 0.1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, dtype=torch.float64, generator=generator) + low


def padded(batch: int, keys: int) -> Tensor:
    """Texts of unlike lengths; the last one is empty."""
    lengths = torch.tensor([keys, *([max(1, keys // 2)] * (batch - 2)), 0])
    return torch.arange(keys) < lengths[:, None]


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("normalizer", CROSS_NORMALIZERS)
@pytest.mark.parametrize("masked", [False, True])
@grids
def test_forward_and_gradients_equal_the_dense_matrix(
    grid: Any, size: Any, key_grid: Any, key_size: Any, masked: bool, normalizer: str, per_head: bool
) -> None:
    """The expected output is a sum over keys, one query after another: nothing of blocks."""
    queries, keys = BlockGrid(grid, block_size=size), BlockGrid(key_grid, block_size=key_size)
    heads, batch = 2, 3
    q, k = drawn(batch, queries.tokens, heads, 4, seed=1), drawn(batch, keys.tokens, heads, 4, seed=2)
    v = drawn(batch, keys.tokens, heads, 5, seed=3, low=-0.5)
    mixing = drawn(*([heads] if per_head else []), queries.num_blocks, keys.num_blocks, seed=4)
    wanted = [q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), mixing.requires_grad_()]
    mask = padded(batch, keys.tokens) if masked else None
    out = cross_mhla(q, k, v, mixing, queries, keys, normalizer=normalizer, eps=1e-6, mask=mask)
    block, key_block = place(grid, size), place(key_grid, key_size)
    rows = []
    for token in range(queries.tokens):
        weight = torch.einsum("bhd,bshd->bhs", q[:, token], k) * mixing[..., block[token], key_block]
        if mask is not None:
            weight = weight.masked_fill(~mask[:, None], 0.0)
        row = torch.einsum("bhs,bshd->bhd", weight, v)
        rows.append(row / (weight.sum(-1, keepdim=True) + 1e-6) if normalizer == "block" else row)
    dense = torch.stack(rows, 1)
    torch.testing.assert_close(out, dense, rtol=1e-10, atol=1e-11)
    if masked:
        assert not out[-1].any()
    cotangent = drawn(*out.shape, seed=5, low=-0.5)
    for found, expected in zip(
        torch.autograd.grad(out, wanted, cotangent, retain_graph=True),
        torch.autograd.grad(dense, wanted, cotangent),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)
    reference = dense_cross_mhla(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        mixing,
        torch.tensor(block),
        torch.tensor(key_block),
        normalizer=normalizer,
        eps=1e-6,
        mask=mask,
    )
    torch.testing.assert_close(reference.transpose(1, 2), dense, rtol=1e-10, atol=1e-11)


def place(grid: tuple[int, ...], size: tuple[int, ...]) -> list[int]:
    """The block of every token, by counting."""
    counts = [math.ceil(n / width) for n, width in zip(grid, size, strict=True)]
    found = []
    for token in range(math.prod(grid)):
        number, rest, scale = 0, token, 1
        for n, width, count in reversed(list(zip(grid, size, counts, strict=True))):
            rest, coordinate = divmod(rest, n)
            number, scale = number + coordinate // width * scale, scale * count
        found.append(number)
    return found


def test_of_one_sequence_it_is_mhla() -> None:
    blocks = BlockGrid((6, 4), block_size=2)
    q, k, v = (drawn(2, 24, 3, 4, seed=seed) for seed in range(3))
    mixing = drawn(6, 6, seed=3)
    in_blocks = [blocks.to_blocks(t.transpose(1, 2)) for t in (q, k, v)]
    inside = mhla(in_blocks[0], in_blocks[1], in_blocks[2], mixing)
    expected = blocks.from_blocks(inside).transpose(1, 2)
    torch.testing.assert_close(cross_mhla(q, k, v, mixing, blocks, blocks), expected)
    for init in ("local_row", "uniform", "exp"):
        own = initial_cross_mixing(blocks, blocks, init)
        torch.testing.assert_close(own.sum(1), torch.ones(6, dtype=torch.float64))
    torch.testing.assert_close(
        initial_cross_mixing(blocks, blocks, "local_row"),
        (weight := 1 - blocks.distances() / blocks.distances().amax(1, keepdim=True))
        / weight.sum(1, keepdim=True),
    )


def layer(**options: Any) -> MHLACrossAttention:
    torch.manual_seed(0)
    given = {"block_size": 3, "context_block_size": 4, **options}
    return MHLACrossAttention(
        12,
        3,
        grid=(5, 7),
        context_grid=(11,),
        context_dim=20,
        options=CrossAttentionOptions(**given),
    ).double()


@pytest.mark.parametrize(
    "options", [{}, {"qk_norm": True, "mix_per_head": True, "normalizer": "none"}], ids=str
)
def test_the_layer_equals_its_projections_around_the_dense_matrix(options: dict[str, Any]) -> None:
    made = layer(feature_map="elu", **options)
    torch.nn.init.uniform_(made.mixing.weight, 0.1, 1.0)
    x, text = drawn(3, 35, 12, low=-0.5).requires_grad_(), drawn(3, 11, 20, seed=1, low=-0.5).requires_grad_()
    mask = padded(3, 11)
    out = made(x, text, mask=mask)
    q = x @ made.q.weight.T + made.q.bias
    k, v = (text @ part.weight.T + part.bias for part in (made.k, made.v))
    if options.get("qk_norm"):
        assert isinstance(made.norm_q, RMSNorm)
        assert isinstance(made.norm_k, RMSNorm)
        q = q * (q.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * made.norm_q.weight
        k = k * (k.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * made.norm_k.weight
    q, k, v = (t.unflatten(-1, (3, 4)).transpose(1, 2) for t in (q, k, v))
    read = dense_cross_mhla(
        torch.where(q > 0, q + 1, q.exp()),
        torch.where(k > 0, k + 1, k.exp()),
        v,
        made.mixing.weight,
        torch.tensor(place((5, 7), (3, 3))),
        torch.tensor(place((11,), (4,))),
        normalizer=options.get("normalizer", "block"),
        eps=1e-6,
        mask=mask,
    )
    dense = read.transpose(1, 2).flatten(2) @ made.o.weight.T + made.o.bias
    torch.testing.assert_close(out, dense, rtol=1e-9, atol=1e-10)
    wanted, cotangent = [x, text, *made.parameters()], drawn(*out.shape, seed=2, low=-0.5)
    for found, expected in zip(
        torch.autograd.grad(out, wanted, cotangent),
        torch.autograd.grad(dense, wanted, cotangent),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


def test_padded_keys_count_nowhere() -> None:
    made, x, text, mask = layer(), drawn(3, 35, 12), drawn(3, 11, 20, seed=1), padded(3, 11)
    loud = torch.where(mask[..., None], text, 50.0)
    torch.testing.assert_close(made(x, text, mask=mask), made(x, loud, mask=mask))
    torch.testing.assert_close(made(x, text, mask=mask)[-1], made.o.bias.expand(35, -1))


@pytest.mark.parametrize("normalizer", CROSS_NORMALIZERS)
def test_flops_are_those_that_torch_counts(normalizer: str) -> None:
    made = layer(normalizer=normalizer).to("meta")
    with FlopCounterMode(display=False) as counter:
        made(torch.empty(1, 35, 12, device="meta").double(), torch.empty(1, 11, 20, device="meta").double())
    assert counter.get_total_flops() == made.flops()


def test_its_mixing_is_projected_and_starts_nonnegative() -> None:
    made = layer()
    assert mixing_matrices(made) == [made.mixing]
    assert made.mixing.weight.shape == (6, 3)
    with torch.no_grad():
        made.mixing.weight.copy_(torch.linspace(-1, 2, 18).view(6, 3))
    made.mixing.project_()
    assert (made.mixing.weight.min(), made.mixing.weight.max()) == (0, 1)


def test_blocks_of_one_place_or_equal_distance_have_no_gaps() -> None:
    """A rule that divides by the largest distance meets 0 where all keys are as far."""
    for grid, key_grid in (((4,), (1,)), ((1,), (4,)), ((3,), (2,)), ((2, 2), (1, 1))):
        queries, keys = BlockGrid(grid, block_size=1), BlockGrid(key_grid, block_size=1)
        weight = CrossMixingMatrix(queries, keys, "local_row").weight
        torch.testing.assert_close(weight.sum(1), torch.ones(queries.num_blocks))
        assert (weight >= 0).all()


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"block_size": None}, "blocks"),
        ({"context_block_size": None}, "context_blocks"),
        ({"context_blocks": 3}, "context_blocks"),
        ({"context_block_size": None, "context_blocks": 7}, "context_blocks"),
        ({"normalizer": "slot"}, "normalizer"),
        ({"mix_init": "local_row"}, "mix_init"),  # 2 axes and 1
        ({"mix_init": "causal_local"}, "mix_init"),
        ({"mix_clamp": [1, 0]}, "mix_clamp"),
        ({"feature_map": "gelu"}, "feature_map"),
        ({"eps": -1}, "eps"),
        ({"eps": "small"}, "eps"),
        ({"qk_norm": 1}, "qk_norm"),
        ({"block_size": 2.0}, "block_size"),
    ],
    ids=str,
)
def test_wrong_options_are_refused_by_their_key(options: dict[str, Any], key: str) -> None:
    with refused(key) as error:
        layer(**options)
    assert "\n" not in str(error.value)


def test_tensors_of_another_shape_are_refused() -> None:
    made = layer()
    x, text = drawn(2, 35, 12), drawn(2, 11, 20)
    for wrong, key in (
        ((x[..., :8], text), "x"),
        ((x[:, :30], text), "q"),
        ((x, text[..., :8]), "context"),
        ((x, text[:1]), "context"),
        ((x, text[:, :9]), "k"),
    ):
        with refused(key):
            made(*wrong)
    for mask in (torch.ones(2, 10, dtype=torch.bool), torch.ones(2, 11), torch.ones(2, 11).long()):
        with refused("mask"):
            made(x, text, mask=mask)
    given = CrossAttentionOptions(blocks=2, context_blocks=2)
    for sizes, key in (({"context_dim": 0}, "context_dim"), ({"dim": 0}, "dim"), ({"heads": True}, "heads")):
        with refused(key):
            MHLACrossAttention(
                **{"dim": 12, "heads": 3, **sizes}, grid=(4,), context_grid=(4,), options=given
            )
    with refused("heads"):
        MHLACrossAttention(
            12, 5, grid=(4,), context_grid=(4,), options=CrossAttentionOptions(blocks=2, context_blocks=2)
        )
