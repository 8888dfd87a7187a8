"""The delta rule: chunks against token by token, what it stores and overwrites, and what it refuses.

The contract over all causal operators is in test_causal_attention.py and test_contract.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mhla_lightning.attention import CausalSelfAttention, build_attention
from mhla_lightning.attention.baselines.causal_deltanet import DeltaNet, delta_rule, delta_rule_recurrent
from mhla_lightning.attention.context import Context
from mhla_lightning.attention.matrix import attention_matrix
from mhla_lightning.backbones import CausalLM, build_backbone
from mhla_lightning.backbones.causal_lm import LANGUAGE_PRESETS
from tests.helpers.errors import refused


def inputs(tokens: int, dim_k: int, dim_v: int, heads: int = 2, batch: int = 2) -> list[Tensor]:
    """q, k of length 1, v (batch, heads, tokens, dim), and beta in (0, 1)."""
    draw = torch.Generator().manual_seed(tokens)
    q, k, v = (
        torch.randn(batch, heads, tokens, dim, dtype=torch.float64, generator=draw)
        for dim in (dim_k, dim_k, dim_v)
    )
    beta = torch.rand(batch, heads, tokens, dtype=torch.float64, generator=draw)
    return [x.requires_grad_() for x in (q, F.normalize(k, dim=-1), v, beta)]


def assert_same(actual: Tensor, expected: Tensor, within: float = 1e-11) -> None:
    torch.testing.assert_close(
        actual, expected, rtol=0, atol=within * max(1e-30, float(expected.detach().abs().max()))
    )


@pytest.mark.parametrize(
    ("tokens", "chunk_size", "dim_k", "dim_v"),
    [(1, 1, 1, 1), (1, 64, 3, 2), (17, 1, 3, 5), (64, 64, 8, 8), (65, 64, 7, 1), (63, 16, 5, 3)],
)
def test_chunks_equal_token_by_token_with_all_gradients(
    tokens: int, chunk_size: int, dim_k: int, dim_v: int
) -> None:
    x = inputs(tokens, dim_k, dim_v)
    found, expected = delta_rule(*x, chunk_size=chunk_size), delta_rule_recurrent(*x)
    for actual, wanted in zip(found, expected, strict=True):  # the outputs, and the last state
        assert_same(actual, wanted)
    draw = torch.Generator().manual_seed(0)
    along = [torch.randn(one.shape, dtype=one.dtype, generator=draw) for one in expected]
    for actual, wanted in zip(
        torch.autograd.grad(found, x, along), torch.autograd.grad(expected, x, along), strict=True
    ):
        assert_same(actual, wanted, 1e-10)


def test_one_key_again_and_again_stays_exact() -> None:
    """Powers of the chunk's matrix grow as binomial coefficients here; float32 must not show it."""
    q, k, v, beta = (x.detach() for x in inputs(256, 8, 4))
    k, beta = k[:, :, :1].expand_as(k), 0.5 + 0.5 * beta
    expected, _ = delta_rule_recurrent(q, k, v, beta)
    found, _ = delta_rule(q.float(), k.float(), v.float(), beta.float(), chunk_size=64)
    assert_same(found.double(), expected, 1e-5)


def test_a_key_reads_the_value_that_was_written_last() -> None:
    """With beta 1 and orthogonal keys the state is a table; linear attention would return the sum."""
    keys = torch.eye(4, dtype=torch.float64)[[0, 1, 2, 1, 0]]
    values = torch.arange(10.0, dtype=torch.float64).view(5, 2)
    queries = torch.eye(4, dtype=torch.float64)[[0, 1, 0, 1, 1]]
    out, state = delta_rule(queries[None, None], keys[None, None], values[None, None], torch.ones(1, 1, 5))
    assert_same(out[0, 0], values[[0, 1, 0, 3, 3]])
    assert_same(state[0, 0], torch.stack([values[4], values[3], values[2], torch.zeros(2).double()]))


def test_the_output_is_a_causal_matrix_times_v() -> None:
    """`mhla analyze` reads this matrix: tril(Q K^T) T."""
    operator = DeltaNet(heads=2, dim_k=4, dim_v=3, chunk_size=4)
    q, k, v, beta = (x.detach().transpose(1, 2) for x in inputs(11, 4, 3))
    matrix = attention_matrix(operator, q, k, v, Context(beta=beta))
    assert matrix.triu(1).abs().max() == 0
    key = F.silu(k.transpose(1, 2))
    key = key / (key.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    rate = beta.transpose(1, 2).unsqueeze(-1)
    query = F.silu(q.transpose(1, 2))
    query = query / (query.square().sum(-1, keepdim=True) + 1e-6).sqrt() / 2
    eye = torch.eye(11, dtype=torch.float64)
    transform = torch.linalg.inv(eye + (rate * (key @ key.mT)).tril(-1)) @ torch.diag_embed(rate.squeeze(-1))
    assert_same(matrix, (query @ key.mT).tril() @ transform, 1e-10)


def test_a_row_of_zeros_has_finite_gradients() -> None:
    layer = CausalSelfAttention(8, attention={"name": "deltanet", "heads": 2}).double()
    x = torch.zeros(1, 5, 8, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    assert first.isfinite().all()
    assert second.isfinite().all()


@pytest.mark.parametrize("preset", LANGUAGE_PRESETS)
def test_the_presets_are_those_of_the_recurrent_models(preset: str) -> None:
    model = build_backbone(
        "lm_tiny",
        attention={"name": "deltanet", "preset": preset},
        vocab_size=8,
        context=16,
        embed_dim=32,
        depth=1,
    )
    assert isinstance(model, CausalLM)
    (layer,) = (module for module in model.modules() if isinstance(module, CausalSelfAttention))
    assert (layer.rotary, list(layer.convs), layer.decay) == (False, ["q", "k", "v"], None)
    assert layer.beta is not None
    assert model(torch.arange(8)[None]).shape == (1, 8, 8)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"chunk_size": 0}, "chunk_size"),
        ({"normalizer": "block"}, "normalizer"),
        ({"decay": "token"}, "decay"),
    ],
    ids=str,
)
def test_what_it_cannot_do_is_refused_by_key(options: dict[str, Any], key: str) -> None:
    with refused(key):
        build_attention({"name": "deltanet", **options}, heads=1, dim_k=4, dim_v=4, causal=True)


def test_it_names_the_beta_that_it_needs() -> None:
    operator = DeltaNet(heads=1, dim_k=4, dim_v=4)
    q, k, v = torch.randn(3, 1, 3, 1, 4)
    with refused("beta"):
        operator(q, k, v)
    state = operator.init_state(1, heads=1, dim_k=4, dim_v=4, device="cpu", dtype=torch.float32)
    with refused("beta"):
        operator.step(q[:, :1], k[:, :1], v[:, :1], state)
