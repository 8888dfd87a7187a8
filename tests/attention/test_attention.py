"""The operator contract, over every registry entry: a new entry is tested by being in the table."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mhla_lightning.attention import (
    ATTENTION,
    MHLA,
    Attention,
    BlockGrid,
    CausalSelfAttention,
    Context,
    SelfAttention,
    build_attention,
    dense_mhla,
    mhla,
    register_attention,
)
from mhla_lightning.attention.context import ContextKeywords
from mhla_lightning.attention.contract import BIDIRECTIONAL, Subject
from mhla_lightning.attention.layers.self_attention import POS_CONVS
from mhla_lightning.attention.mhla import fused
from mhla_lightning.errors import UserError
from tests.helpers.errors import refused
from tests.helpers.marks import every_nth

HEADS, DIM_K, DIM_V = 3, 4, 5
GRIDS = [(1,), (5,), (22,), (4, 4), (7, 10), (3, 5, 4)]
OPERATORS: list[str | dict] = [
    "softmax",
    "linear",
    {"name": "mhla", "blocks": 1},
    {"name": "mhla", "block_size": 3},
    {"name": "mhla", "block_size": 2, "normalizer": "none"},
    {"name": "mhla", "block_size": 3, "feature_map": "elu"},
    {"name": "mhla", "block_size": 3, "feature_map": "relu"},
    {"name": "mhla", "block_size": 3, "mix_per_head": True},
    {"name": "mhla", "block_size": 3, "feature_map": "elu", "reweight_keys": True},
    {"name": "linear", "feature_map": "elu", "reweight_keys": True},
    {"name": "mhla", "block_size": 3, "mix_form": "relative"},
]


def label(value: object) -> str:
    return "-".join(str(v) for v in value.values()) if isinstance(value, dict) else str(value)


def build(entry: str | dict, grid: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Attention:
    torch.manual_seed(0)
    operator = build_attention(entry, heads=HEADS, dim_k=DIM_K, dim_v=DIM_V, grid=grid).to(dtype)
    for parameter in operator.parameters():  # not symmetric: tells a matrix from its transpose
        torch.nn.init.uniform_(parameter, 0.1, 1.0)
    return operator


def inputs(tokens: int, batch: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(batch, tokens, HEADS, d, dtype=dtype, generator=generator).requires_grad_()
        for d in (DIM_K, DIM_K, DIM_V)
    ]


def reference(
    operator: Attention, entry: str | dict, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None
) -> Tensor:
    """The same attention with its full matrix."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    name = entry if isinstance(entry, str) else entry["name"]
    if name == "softmax":
        scores = q @ k.mT / math.sqrt(DIM_K)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None], -math.inf)
        out = scores.softmax(-1) @ v
        return (out if mask is None else out * mask[:, None, :, None]).transpose(1, 2)
    phi: Callable[[Tensor], Tensor] = operator.phi  # type: ignore[assignment]
    q, k = phi(q), phi(k)
    if not isinstance(entry, str) and entry.get("reweight_keys"):
        real = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool) if mask is None else mask
        k = k * rala_weights(q, k, real)
    if isinstance(operator, MHLA):
        mixing, blocks, normalizer = (
            operator.mixing.matrix(),
            operator.grid.block_of_token,
            operator.normalizer,
        )
    else:
        mixing, blocks, normalizer = (
            torch.ones(1, 1, dtype=q.dtype),
            torch.zeros(q.shape[2], dtype=torch.long),
            "block",
        )
    out = dense_mhla(q, k, v, mixing, blocks, normalizer=normalizer, eps=1e-6, mask=mask)
    return out.transpose(1, 2)


def rala_weights(q: Tensor, k: Tensor, real: Tensor) -> Tensor:
    """N exp(s_t) / sum exp(s) over the N real tokens, with s_t = mean(q) . k_t / sqrt(dim)."""
    real = real[:, None, :, None].to(q.dtype)
    count = real.sum(2, keepdim=True)
    mean = (q * real).sum(2, keepdim=True) / count
    weights = torch.exp((mean * k).sum(-1, keepdim=True) / math.sqrt(DIM_K)) * real
    return count * weights / weights.sum(2, keepdim=True)


def test_every_registered_operator_is_covered() -> None:
    assert {e if isinstance(e, str) else e["name"] for e in OPERATORS} == set(ATTENTION)


@pytest.mark.parametrize("grid", GRIDS, ids=label)
@pytest.mark.parametrize("entry", OPERATORS, ids=label)
def test_forward_and_all_gradients_equal_the_dense_reference(
    entry: str | dict, grid: tuple[int, ...]
) -> None:
    operator = build(entry, grid)
    q, k, v = inputs(math.prod(grid))
    wanted = [q, k, v, *operator.parameters()]
    out, dense = operator(q, k, v, grid=grid), reference(operator, entry, q, k, v)
    assert out.shape == v.shape
    torch.testing.assert_close(out, dense, rtol=1e-10, atol=1e-11)
    cotangent = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(2))
    actual = torch.autograd.grad(out, wanted, cotangent, allow_unused=True)
    expected = torch.autograd.grad(dense, wanted, cotangent, allow_unused=True)
    for a, e in zip(actual, expected, strict=True):
        assert (a is None) == (e is None)
        if a is not None:
            torch.testing.assert_close(a, e, rtol=1e-8, atol=1e-9)


def subject(entry: str | dict) -> Subject:
    name, options = (entry, {}) if isinstance(entry, str) else (entry["name"], dict(entry))
    options.pop("name", None)

    def by_hand(operator: Attention, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        return reference(operator, entry, q, k, v, context.mask)

    return Subject(ATTENTION[name], options, reference=by_hand, heads=HEADS, dim_k=DIM_K, dim_v=DIM_V)


@pytest.mark.parametrize("check", ["dense", "padding", "FLOPs"])
@pytest.mark.parametrize("entry", OPERATORS, ids=label)
def test_the_contract_holds_beside_the_references_of_these_tests(entry: str | dict, check: str) -> None:
    BIDIRECTIONAL[check](subject(entry))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("entry", OPERATORS, ids=label)
def test_padding_counts_nowhere(entry: str | dict, side: str) -> None:
    grid, padded = (11,), 4
    operator = build(entry, grid)
    mask = torch.ones(2, 11, dtype=torch.bool)
    mask[0, slice(0, padded) if side == "left" else slice(-padded, None)] = False
    q, k, v = inputs(11)
    out = operator(q, k, v, mask=mask)
    assert (out[~mask] == 0).all()
    torch.testing.assert_close(out, reference(operator, entry, q, k, v, mask), rtol=1e-10, atol=1e-11)
    loud = [torch.where(mask[..., None, None], x, 1e3) for x in (q, k, v)]
    torch.testing.assert_close(operator(*loud, mask=mask), out, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(
        out[1], operator(*(x[1:] for x in (q, k, v)))[0], rtol=1e-10, atol=1e-11
    )  # the full sample, alone


@pytest.mark.parametrize("entry", OPERATORS, ids=label)
def test_a_sample_of_padding_only_stays_finite(entry: str | dict) -> None:
    operator = build(entry, (6,))
    q, k, v = inputs(6)
    out = operator(q, k, v, mask=torch.tensor([[False] * 6, [True] * 6]))
    out.sum().backward()
    assert torch.isfinite(out).all()
    assert all(torch.isfinite(x.grad).all() for x in (q, k, v) if x.grad is not None)


@pytest.mark.parametrize("entry", OPERATORS, ids=label)
def test_rotary_turns_numerators_only(entry: str | dict) -> None:
    """A rotation that is the same for all tokens leaves q.k alone, so nothing may change; one that turns
    keys by token must change the result.
    """
    operator = build(entry, (9,))
    q, k, v = inputs(9)
    turn = torch.linalg.qr(
        torch.randn(DIM_K, DIM_K, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    )[0]
    plain = operator(q, k, v)
    torch.testing.assert_close(operator(q, k, v, rotary=lambda x: x @ turn), plain, rtol=1e-10, atol=1e-11)
    signs = torch.tensor([1.0, -1.0] * 5, dtype=torch.float64)[:9, None, None]
    assert not torch.allclose(operator(q, k, v, rotary=lambda x: x * signs), plain)
    if entry == "linear" or (isinstance(entry, dict) and entry.get("normalizer") != "none"):
        constant = torch.ones_like(
            v
        )  # values of 1 read out numerator / denominator: the denominator must be the unrotated one
        phi: Callable[[Tensor], Tensor] = operator.phi  # type: ignore[assignment]
        halved = operator(q, k, constant, rotary=lambda x: x * math.sqrt(0.5))
        torch.testing.assert_close(halved, 0.5 * operator(q, k, constant), rtol=1e-9, atol=1e-10)
        assert phi(q).shape == q.shape


@pytest.mark.parametrize("entry", OPERATORS, ids=label)
def test_flops_are_what_torch_counts(entry: str | dict) -> None:
    operator = build(entry, (7, 10)).to("meta")
    q, k, v = (x.to("meta") for x in inputs(70, batch=1))
    with FlopCounterMode(display=False) as counter:
        operator(q, k, v)
    assert counter.get_total_flops() == operator.flops(70, HEADS, DIM_K, DIM_V)


@pytest.mark.parametrize("entry", every_nth(OPERATORS, 3), ids=label)
@pytest.mark.parametrize("masked", every_nth([True, False], 2), ids=["masked", "plain"])
def test_compiles_without_graph_breaks(entry: str | dict, masked: bool) -> None:
    torch.compiler.reset()
    operator = build(entry, (7, 10))
    q, k, v = inputs(70)
    mask = torch.rand(2, 70, generator=torch.Generator().manual_seed(4)) < 0.8 if masked else None
    compiled = torch.compile(operator, fullgraph=True, backend="aot_eager")
    wanted = [q, k, v, *operator.parameters()]
    for a, e in zip(
        _with_gradients(compiled, q, k, v, mask, wanted),
        _with_gradients(operator, q, k, v, mask, wanted),
        strict=True,
    ):
        torch.testing.assert_close(a, e, rtol=1e-8, atol=1e-9)


def _with_gradients(
    operator: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    wanted: list[Tensor],
) -> list[Tensor]:
    out = operator(q, k, v, mask=mask)
    return [out, *torch.autograd.grad(out.square().sum(), wanted)]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(ATTENTION))
def test_inductor_agrees(name: str) -> None:
    torch.compiler.reset()
    layer = SelfAttention(
        24,
        3,
        attention={
            "name": name,
            **({"blocks": 4} if name == "mhla" else {}),
            "pos_conv": "lepe3",
            "qk_norm": True,
        },
        grid=(8, 12),
    )
    x = torch.randn(2, 96, 24)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("entry", ["linear", {"name": "mhla", "blocks": 128}], ids=label)
def test_bf16_at_16k_tokens_accumulates_in_float32(entry: str | dict) -> None:
    """Sums of 16,384 positive terms: bf16 stops growing at 256. Under autocast and with bf16 inputs the
    result stays at bf16's own rounding.
    """
    tokens = 16384
    operator = build_attention(entry, heads=2, dim_k=16, dim_v=16, grid=(tokens,))
    q, k, v = (
        torch.randn(1, tokens, 2, 16, generator=torch.Generator().manual_seed(5)).bfloat16() for _ in range(3)
    )
    exact = operator(*(x.double() for x in (q, k, v)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = operator(q, k, v)
    assert half.dtype == torch.bfloat16
    assert torch.isfinite(half).all()
    assert (half.double() - exact).abs().max() < 2**-7 * exact.abs().max()


def test_gradients_are_finite_in_bf16_autocast() -> None:
    layer = SelfAttention(32, 2, attention={"name": "mhla", "blocks": 16, "qk_norm": True}, grid=(4096,))
    x = torch.randn(1, 4096, 32, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(x).float().sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters() if p.grad is not None)


def test_scaling_a_row_of_the_mixing_matrix_changes_nothing_and_a_column_does() -> None:
    """Fact (a) of SPEC 1.1."""
    grid = BlockGrid((12,), 4)
    q, k, v = (grid.to_blocks(x.detach().transpose(1, 2).abs()) for x in inputs(12))
    mixing = torch.rand(4, 4, dtype=torch.float64) + 0.1
    scale = torch.tensor([1.0, 3.0, 0.2, 7.0], dtype=torch.float64)
    for normalizer in ("block", "slot"):
        plain = mhla(q, k, v, mixing, normalizer=normalizer, eps=0.0)
        torch.testing.assert_close(
            mhla(q, k, v, scale[:, None] * mixing, normalizer=normalizer, eps=0.0), plain
        )
        assert not torch.allclose(mhla(q, k, v, mixing * scale, normalizer=normalizer, eps=0.0), plain)


def test_block_normalizer_ignores_other_blocks_queries_and_slot_does_not() -> None:
    grid = BlockGrid((12,), 4)
    q, k, v = (grid.to_blocks(x.detach().transpose(1, 2).abs()) for x in inputs(12))
    other = q.clone()
    other[:, :, 3] *= 2
    mixing = torch.rand(4, 4, dtype=torch.float64) + 0.1
    for normalizer, same in (("block", True), ("slot", False), ("none", True)):
        first, second = (mhla(x, k, v, mixing, normalizer=normalizer)[:, :, 0] for x in (q, other))
        assert torch.equal(first, second) == same


def test_one_block_is_linear_attention() -> None:
    q, k, v = inputs(20)
    one = build_attention({"name": "mhla", "blocks": 1}, heads=HEADS, dim_k=DIM_K, dim_v=DIM_V, grid=(20,))
    linear = build_attention(
        {"name": "linear", "feature_map": "relu_eps"}, heads=HEADS, dim_k=DIM_K, dim_v=DIM_V
    )
    torch.testing.assert_close(one(q, k, v), linear(q, k, v))


@pytest.mark.parametrize("layout", ["shared", "per head", "panels"])
@pytest.mark.parametrize("budget", [1, 500, 2**20], ids=["tiny slices", "some slices", "one slice"])
@pytest.mark.parametrize("grid", [(7, 10), (4, 7, 5), (4, 6, 3)], ids=label)
def test_slices_of_the_fused_path_change_nothing(
    grid: tuple[int, ...], budget: int, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = {
        "name": "mhla",
        "block_size": 3 if len(grid) == 2 else (2, 2, 3),
        "mix_per_head": layout == "per head",
    }
    operator = build(entry, grid)
    q, k, v = inputs(math.prod(grid), batch=5)
    monkeypatch.setattr(fused, "SLICE_ELEMENTS", budget)
    if layout == "panels":  # as large summaries are mixed; the last one is narrower
        monkeypatch.setattr(fused, "PANELS_FROM", 1)
        monkeypatch.setattr(fused, "PANEL", 7)
    out, dense = operator(q, k, v), reference(operator, entry, q, k, v)
    wanted = [q, k, v, *operator.parameters()]
    torch.testing.assert_close(out, dense, rtol=1e-10, atol=1e-11)
    for a, e in zip(
        torch.autograd.grad(out.sum(), wanted), torch.autograd.grad(dense.sum(), wanted), strict=True
    ):
        torch.testing.assert_close(a, e, rtol=1e-8, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(operator(q, k, v), dense, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("pos_conv", POS_CONVS)
@pytest.mark.parametrize("grid", [(12,), (4, 6), (2, 3, 4)], ids=label)
def test_layer_on_one_two_and_three_axes(grid: tuple[int, ...], pos_conv: str) -> None:
    layer = SelfAttention(
        12,
        3,
        attention={
            "name": "mhla",
            "blocks": 2,
            "pos_conv": pos_conv,
            "gate": True,
            "out_norm": True,
            "inner_norm": True,
        },
        grid=grid,
    )
    x = torch.randn(2, math.prod(grid), 12)
    assert layer(x).shape == x.shape
    with FlopCounterMode(display=False) as counter:
        layer.to("meta")(x[:1].to("meta"))
    assert counter.get_total_flops() == layer.flops(grid)


def test_layer_ignores_padded_tokens() -> None:
    entry = {"name": "mhla", "blocks": 2, "pos_conv": "lepe3", "qk_norm": True}
    layer = SelfAttention(12, 3, attention=entry, grid=(4, 6))
    x, mask = torch.randn(2, 24, 12), torch.rand(2, 24) < 0.7
    loud = torch.where(mask[..., None], x, 50.0)
    torch.testing.assert_close(layer(x, mask=mask)[mask], layer(loud, mask=mask)[mask])


@pytest.mark.parametrize(
    ("entry", "key"),
    [
        ("mlha", "name"),
        ({"name": "mhla", "block": 4}, "block"),
        ({"name": "softmax", "blocks": 4}, "blocks"),
        ({"blocks": 4}, "name"),
        ({"name": "mhla"}, "blocks"),
        ({"name": "mhla", "blocks": 4, "block_size": 2}, "blocks"),
        ({"name": "mhla", "blocks": 9}, "blocks"),
        ({"name": "mhla", "blocks": [2, 2]}, "blocks"),
        ({"name": "mhla", "block_size": 0}, "block_size"),
        ({"name": "mhla", "blocks": 3, "normalizer": "slot"}, "normalizer"),
        ({"name": "mhla", "blocks": 2, "normalizer": "rows"}, "normalizer"),
        ({"name": "mhla", "blocks": 2, "mix_init": "locl"}, "mix_init"),
        ({"name": "mhla", "blocks": 2, "mix_init_options": {"sigma": 1}}, "mix_init_options.sigma"),
        ({"name": "mhla", "blocks": 2, "feature_map": "gelu"}, "feature_map"),
        ({"name": "mhla", "blocks": 2, "mix_clamp": [1, 0]}, "mix_clamp"),
    ],
    ids=str,
)
def test_a_wrong_entry_is_refused_by_its_key(entry: str | dict, key: str) -> None:
    with refused(key) as error:
        build_attention(entry, heads=2, dim_k=4, dim_v=4, grid=(10,))
    assert "\n" not in str(error.value)


def test_a_layer_names_the_key_inside_its_attention() -> None:
    for entry, key in (
        ({"name": "mhla", "blocks": 9}, "attention.blocks"),
        ({"name": "softmax", "pos_conv": "lepe7"}, "attention.pos_conv"),
        ({"name": "softmax", "gates": True}, "attention.gates"),
        ("mlha", "attention.name"),
    ):
        with refused(key):
            SelfAttention(8, 2, attention=entry, grid=(10,))
    with refused("heads"):
        SelfAttention(8, 3, grid=(10,))


@pytest.mark.parametrize(
    ("shape", "said"),
    [((2, 20, 8), "(2, 20, 8)"), ((20, 16), "(20, 16)"), ((2, 16, 4, 5), "x.flatten(2).transpose(1, 2)")],
)
@pytest.mark.parametrize("causal", [False, True])
def test_a_tensor_of_another_shape_is_told_in_the_layers_terms(
    shape: tuple[int, ...], said: str, causal: bool
) -> None:
    layer = CausalSelfAttention(16, context=20) if causal else SelfAttention(16, 2, grid=(4, 5))
    with refused("x") as error:
        layer(torch.zeros(shape))
    assert said in error.value.reason
    assert "(batch, tokens, 16)" in error.value.reason


def test_unknown_names_come_with_the_valid_ones_and_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'mhla'. valid: linear, mhla, softmax"):
        build_attention("mlha", heads=2, dim_k=4, dim_v=4)


def test_a_context_and_keywords_give_the_same_and_do_not_mix() -> None:
    operator = build({"name": "mhla", "block_size": 3}, (11,))
    q, k, v = inputs(11)
    mask = torch.arange(11).expand(2, -1) < 9
    assert torch.equal(operator(q, k, v, Context(mask=mask)), operator(q, k, v, mask=mask))
    with refused("context"):
        operator(q, k, v, Context(), mask=mask)
    assert {field.name for field in fields(Context)} == set(ContextKeywords.__annotations__)


@pytest.mark.parametrize("name", sorted(ATTENTION))
def test_bidirectional_operators_refuse_documents(name: str) -> None:
    options = {"name": name, **({"blocks": 2} if name == "mhla" else {})}
    operator = build_attention(options, heads=HEADS, dim_k=DIM_K, dim_v=DIM_V, grid=(6,))
    with refused("documents"):
        operator(*inputs(6), documents=torch.zeros(2, 6, dtype=torch.long))


def test_registering_a_taken_name_is_refused() -> None:
    with refused("name"):
        register_attention("mhla", ATTENTION["softmax"])
    assert ATTENTION["mhla"] is MHLA


def test_attention_needs_torch_alone() -> None:
    others = {"lightning", "deepspeed", "timm", "webdataset", "torchvision", "triton"}
    code = (
        f"import sys, mhla_lightning.attention; print(sorted({{m.partition('.')[0] for m in "
        f"sys.modules}} & {others}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
