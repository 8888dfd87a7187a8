"""The causal contract over every registry entry: parallel, streamed and written out are the same; nothing
sees the future or a neighbour.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mhla_lightning.attention import (
    CAUSAL_ATTENTION,
    CausalAttention,
    Packing,
    build_attention,
    register_attention,
)
from mhla_lightning.attention.contract import CAUSAL, Subject
from mhla_lightning.attention.contract.causal import stream
from mhla_lightning.attention.contract.subject import cut
from tests.helpers.causal_reference import dense
from tests.helpers.errors import refused
from tests.helpers.language_models import CUDA_ONLY
from tests.helpers.marks import every_nth

HEADS, DIM_K, DIM_V = 2, 4, 5
MHLA = {"name": "mhla", "chunk_size": 8, "max_chunks": 5}
SHIFT = MHLA | {"extrapolation": "shift", "max_chunks": 3}
RELATIVE = MHLA | {"mix_form": "relative", "max_chunks": 4}
OPERATORS: list[dict[str, Any]] = [
    {"name": "softmax"},
    {"name": "linear", "chunk_size": 8},
    {"name": "linear", "chunk_size": 8, "normalizer": "block", "feature_map": "relu_eps"},
    {"name": "linear", "chunk_size": 8, "decay": "head"},
    {"name": "linear", "chunk_size": 8, "decay": "token", "normalizer": "block", "feature_map": "elu"},
    MHLA,
    MHLA | {"normalizer": "block", "feature_map": "relu_eps"},
    MHLA | {"mix_per_head": True, "mix_init": "causal_local"},
    SHIFT,
    SHIFT | {"max_chunks": 1},
    RELATIVE,
    RELATIVE | {"max_chunks": 1, "feature_map": "elu"},
    RELATIVE | {"max_chunks": 2, "mix_per_head": False, "normalizer": "block", "feature_map": "relu_eps"},
    MHLA | {"intra": "decay"},
    SHIFT | {"decay": "token"},
    SHIFT | {"decay": "token", "decay_span": "sequence", "normalizer": "block", "feature_map": "relu_eps"},
    RELATIVE | {"decay": "head", "decay_span": "sequence"},
    RELATIVE | {"decay": "token", "decay_span": "sequence"},
    SHIFT | {"intra": "window"},
    RELATIVE | {"intra": "window", "decay": "token", "decay_span": "sequence"},
    {"name": "deltanet", "chunk_size": 8},
]


def label(entry: dict[str, Any]) -> str:
    return "-".join(str(value) for value in entry.values())


every_operator = pytest.mark.parametrize("entry", OPERATORS, ids=label)


def build(entry: dict[str, Any], dtype: torch.dtype = torch.float64) -> CausalAttention:
    torch.manual_seed(0)
    operator = build_attention(entry, heads=HEADS, dim_k=DIM_K, dim_v=DIM_V, causal=True).to(dtype)
    assert isinstance(operator, CausalAttention)
    for parameter in operator.parameters():
        torch.nn.init.uniform_(parameter, 0.1, 1.0)
    return operator


def inputs(
    operator: CausalAttention, tokens: int, batch: int = 2, dtype: torch.dtype = torch.float64
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    made = {
        name: torch.randn(batch, tokens, HEADS, dim, dtype=dtype, generator=generator)
        for name, dim in zip("qkv", (DIM_K, DIM_K, DIM_V), strict=True)
    }
    if operator.token_decay:
        made["log_decay"] = -torch.rand(batch, tokens, HEADS, dtype=dtype, generator=generator)
    if operator.token_beta:
        made["beta"] = torch.rand(batch, tokens, HEADS, dtype=dtype, generator=generator)
    return {name: x.requires_grad_() for name, x in made.items()}


def gradients(operator: CausalAttention, x: dict[str, Any], out: Tensor) -> list[Tensor]:
    cotangent = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).to(
        out.dtype
    )
    found = torch.autograd.grad(
        out, [*x.values(), *operator.parameters()], cotangent, allow_unused=True, materialize_grads=True
    )
    return list(found)


def assert_same(actual: Tensor, expected: Tensor, within: float) -> None:
    """Largest difference relative to the largest value."""
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= within * expected.abs().max().clamp_min(1e-300), (
        (actual - expected).abs().max()
    )


def test_every_registered_operator_is_covered() -> None:
    assert {entry["name"] for entry in OPERATORS} == set(CAUSAL_ATTENTION) - set(
        CUDA_ONLY
    )  # tests/test_fla.py covers exactly those


@pytest.mark.parametrize("budget", [1, 200, 2**20], ids=["a chunk a slice", "some slices", "one slice"])
@pytest.mark.parametrize(
    "entry",
    [MHLA, MHLA | {"mix_per_head": True}, SHIFT, RELATIVE, {"name": "linear", "chunk_size": 8}],
    ids=label,
)
def test_the_sliced_form_for_long_rows_changes_nothing(
    entry: dict[str, Any], budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[int] = []
    sliced = sys.modules["mhla_lightning.attention.mhla.fused_causal"]
    heads = sliced._heads
    monkeypatch.setattr(sliced, "WORTHWHILE", 1)
    monkeypatch.setattr(sliced, "SLICE_ELEMENTS", budget)

    def watched(*tensors: Tensor) -> Iterator[tuple[Any, ...]]:
        used.append(len(tensors))
        return heads(*tensors)

    monkeypatch.setattr(sliced, "_heads", watched)
    operator = build(entry)
    for tokens in (1, 8, 37):
        x = inputs(operator, tokens)
        out, expected = operator(**x), dense(operator, **x)
        assert_same(out, expected, 1e-10)
        for actual, gradient in zip(
            gradients(operator, x, out), gradients(operator, x, expected), strict=True
        ):
            assert_same(actual, gradient, 1e-9)
    assert used == [4, 7] * 3  # forward and backward both went there


@pytest.mark.parametrize("tokens", every_nth([1, 7, 8, 9, 22, 40], 2))
@every_operator
def test_parallel_and_token_by_token_equal_the_full_matrix_with_all_gradients(
    entry: dict[str, Any], tokens: int
) -> None:
    operator = build(entry)
    x = inputs(operator, tokens)
    expected = dense(operator, **x)
    wanted = gradients(operator, x, expected)
    assert any(g.abs().max() > 0 for g in wanted)
    prompts = {0, tokens // 2, tokens - 1}
    for out in (operator(**x), *(stream(operator, x, prompt) for prompt in prompts)):
        assert_same(out, expected, 1e-10)
        for actual, gradient in zip(gradients(operator, x, out), wanted, strict=True):
            assert_same(actual, gradient, 1e-9)


LENGTHS = [1, 63, 64, 65, 200, 256, 2048, 2049]


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("dtype", every_nth([torch.float64, torch.float32], 2), ids=["float64", "float32"])
def test_the_paper_s_chunks_agree_at_the_lengths_of_the_paper(tokens: int, dtype: torch.dtype) -> None:
    """32 chunks of 64; 2,049 tokens need the 33rd, and `shift`."""
    within = 1e-10 if dtype == torch.float64 else 1e-5
    exact = build({"name": "mhla", "extrapolation": "shift"})
    operator = build({"name": "mhla", "extrapolation": "shift" if tokens > 2048 else None}).to(dtype)
    x = inputs(exact, tokens, batch=1)
    expected = dense(exact, **x)
    wanted = gradients(exact, x, expected)
    y = {name: value.detach().to(dtype).requires_grad_() for name, value in x.items()}
    out = operator(**y)
    assert_same(out.double(), expected, within)
    for actual, gradient in zip(gradients(operator, y, out), wanted, strict=True):
        assert_same(actual.double(), gradient, within)
    with torch.no_grad():
        for prompt in {0, tokens - 1, tokens // 3}:
            assert_same(stream(operator, y, prompt).double(), expected, within)


@pytest.mark.parametrize("check", ["causality", "streaming", "FLOPs"])
@every_operator
def test_the_contract_holds(entry: dict[str, Any], check: str) -> None:
    options = {key: value for key, value in entry.items() if key != "name"}
    kind = CAUSAL_ATTENTION[entry["name"]]
    CAUSAL[check](Subject(kind, options, heads=HEADS, dim_k=DIM_K, dim_v=DIM_V))


@every_operator
def test_no_token_sees_a_later_one(entry: dict[str, Any]) -> None:
    operator = build(entry)
    with torch.no_grad():
        x = inputs(operator, 30)
        out = operator(**x)
        for t in (0, 7, 8, 20, 29):
            moved = {name: value.clone() for name, value in x.items()}
            for name in moved:
                moved[name][:, t] = moved[name][:, t] * 3 - (0 if name in ("log_decay", "beta") else 1)
            other = operator(**moved)
            assert torch.equal(other[:, :t], out[:, :t])
            assert not torch.equal(other[:, t:], out[:, t:])


@every_operator
def test_packed_documents_are_as_if_alone(entry: dict[str, Any]) -> None:
    """Outputs and gradients of three documents in a row equal those of each alone; the second row holds
    one document and padding.
    """
    operator = build(entry)
    x = inputs(operator, 37)
    borders = [[0, 5, 6, 29, 37], [0, 24, 37]]
    documents = torch.stack(
        [torch.repeat_interleave(torch.arange(len(b) - 1), torch.tensor(b).diff()) for b in borders]
    )
    mask = torch.ones(2, 37, dtype=torch.bool)
    mask[1, 24:] = False
    pieces = [
        (row, b[i], b[i + 1])
        for row, b in enumerate(borders)
        for i in range(len(b) - 1)
        if not (row == 1 and i == 1)
    ]
    alone = torch.zeros_like(x["v"])
    for row, start, stop in pieces:
        one = {name: value[row : row + 1, start:stop] for name, value in x.items()}
        alone = alone + torch.nn.functional.pad(
            dense(operator, **one), (0, 0, 0, 0, start, 37 - stop, row, 1 - row)
        )
    loud = {
        name: torch.where(mask[:, :, None, None] if value.dim() == 4 else mask[:, :, None], value, torch.nan)
        for name, value in x.items()
    }
    packed = operator(**loud, documents=documents, mask=mask)
    assert_same(packed, alone, 1e-10)
    assert (packed[~mask] == 0).all()
    for actual, expected in zip(gradients(operator, x, packed), gradients(operator, x, alone), strict=True):
        assert_same(actual, expected, 1e-9)


@every_operator
def test_no_token_sees_another_document(entry: dict[str, Any]) -> None:
    operator = build(entry)
    documents = torch.tensor([[3] * 11 + [4] * 2 + [9] * 17] * 2)
    with torch.no_grad():
        x = inputs(operator, 30)
        out = operator(**x, documents=documents)
        changed = 0
        for t in (0, 10, 11, 12, 13, 29):
            moved = {name: value.clone() for name, value in x.items()}
            for name in moved:
                moved[name][0, t] = moved[name][0, t] * 1e3 - (0 if name in ("log_decay", "beta") else 1)
            other = operator(**moved, documents=documents)
            unchanged = documents[0] != documents[0, t]
            assert torch.equal(other[0, unchanged], out[0, unchanged])
            assert torch.equal(other[1], out[1])
            changed += not torch.equal(other[0], out[0])
        assert changed >= 4  # relu may leave a single token without any feature


@pytest.mark.parametrize("side", ["left", "right"])
@every_operator
def test_a_padded_batch_is_as_each_sequence_alone(entry: dict[str, Any], side: str) -> None:
    """Prompts of 3, 8, 17 and 0 missing tokens: prefill, then ten tokens one by one, with chunks that end
    at different times.
    """
    operator = build(entry)
    with torch.no_grad():
        x = inputs(operator, 30, batch=4)
        missing = [3, 8, 17, 0]
        mask = torch.ones(4, 20, dtype=torch.bool)
        for row, n in enumerate(missing):
            mask[row, slice(0, n) if side == "left" else slice(20 - n, 20)] = False
        streamed = stream(operator, x, 20, mask)
        assert (streamed[:, :20][~mask] == 0).all()
        for row in range(4):
            real = torch.cat([mask[row], torch.ones(10, dtype=torch.bool)])
            one = {name: value[row : row + 1, real] for name, value in x.items()}
            assert_same(streamed[row, real], dense(operator, **one)[0], 1e-10)


@every_operator
def test_a_state_can_be_reordered(entry: dict[str, Any]) -> None:
    operator = build(entry)
    with torch.no_grad():
        x = inputs(operator, 24, batch=3)
        mask = torch.ones(3, 13, dtype=torch.bool)
        mask[1, :6] = False
        _, state = operator.prefill(**cut(x, 0, 13), mask=mask)
        before = state.bytes
        order = torch.tensor([1, 1, 2, 0])
        state = state.reorder(order)
        assert state.bytes == before // 3 * 4
        for t in range(13, 24):
            out, state = operator.step(
                **{name: value[order] for name, value in cut(x, t, t + 1).items()}, state=state
            )
            for row, source in enumerate(order.tolist()):
                real = torch.cat([mask[source], torch.ones(t - 12, dtype=torch.bool)])
                one = {name: value[source : source + 1, : t + 1][:, real] for name, value in x.items()}
                assert_same(out[row, 0], dense(operator, **one)[0, -1], 1e-10)


@every_operator
def test_rotary_turns_numerators_only(entry: dict[str, Any]) -> None:
    operator = build(entry)
    x = inputs(operator, 19)
    turn = torch.linalg.qr(
        torch.randn(DIM_K, DIM_K, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    )[0]
    plain = operator(**x)
    assert_same(operator(**x, rotary=lambda y: y @ turn), plain, 1e-9)
    if entry.get("normalizer") == "block":
        ones = x | {"v": torch.ones_like(x["v"])}
        assert_same(operator(**ones, rotary=lambda y: y / 2**0.5), 0.5 * operator(**ones), 1e-9)
    with torch.no_grad():
        signs = torch.tensor([1.0, -1.0] * 10, dtype=torch.float64)[:19, None, None]
        turned = operator(**x, rotary=lambda y: y * signs[: y.shape[1]])
        assert not torch.allclose(turned, plain)
        _, state = operator.prefill(**cut(x, 0, 18), rotary=lambda y: y * signs[:18])
        last, _ = operator.step(**cut(x, 18, 19), state=state, rotary=lambda y: y * signs[18])
        assert_same(last, turned[:, 18:], 1e-10)


@every_operator
def test_flops_are_what_torch_counts(entry: dict[str, Any]) -> None:
    operator = build(entry).to("meta")
    x = {name: value.to("meta") for name, value in inputs(operator, 38, batch=1).items()}
    with FlopCounterMode(display=False) as counter:
        operator(**x)
    assert counter.get_total_flops() == operator.flops(38, HEADS, DIM_K, DIM_V)


@pytest.mark.parametrize("entry", every_nth(OPERATORS, 8), ids=label)
def test_compiles_without_graph_breaks(entry: dict[str, Any]) -> None:
    torch.compiler.reset()
    operator = build(entry)
    x = inputs(operator, 22)
    out, expected = torch.compile(operator, fullgraph=True, backend="aot_eager")(**x), operator(**x)
    assert_same(out, expected, 1e-10)
    for actual, gradient in zip(gradients(operator, x, out), gradients(operator, x, expected), strict=True):
        assert_same(actual, gradient, 1e-9)


@every_operator
def test_bf16_autocast_is_summed_in_float32(entry: dict[str, Any]) -> None:
    operator = build(
        entry | ({"max_chunks": 64} if entry["name"] == "mhla" and "extrapolation" not in entry else {}),
        torch.float32,
    )
    x = {name: value.bfloat16() for name, value in inputs(operator, 512, dtype=torch.float32).items()}
    with torch.no_grad():
        exact = operator(**{name: value.float() for name, value in x.items()})
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = operator(**x)
    assert half.dtype == torch.bfloat16
    assert_same(half.float(), exact, 2**-6)


@pytest.mark.parametrize(
    ("entry", "kept"),
    [
        (SHIFT, 2),
        (RELATIVE, 2),
        (MHLA | {"max_chunks": 100}, 14),
        ({"name": "linear", "chunk_size": 8}, 0),
        ({"name": "deltanet", "chunk_size": 8}, 0),
    ],
    ids=["shift", "relative", "all", "linear", "deltanet"],
)
def test_the_state_stops_growing(entry: dict[str, Any], kept: int) -> None:
    """At most max_chunks summaries a head, with the current chunk and one mixed prefix (and one merged
    summary of the relative form).
    """
    operator = build(entry)
    with torch.no_grad():
        x = inputs(operator, 120, batch=1)
        _, early = operator.prefill(**cut(x, 0, 64))
        _, late = operator.prefill(**x)
        streamed = operator.init_state(
            1, heads=HEADS, dim_k=DIM_K, dim_v=DIM_V, device="cpu", dtype=torch.float64
        )
        for t in range(120):
            _, streamed = operator.step(**cut(x, t, t + 1), state=streamed)
    summary = HEADS * DIM_K * DIM_V * 8
    extra = (
        {"shift": 2, "relative": 3}.get("relative" if "mix_form" in entry else "shift", 0)
        if entry["name"] == "mhla"
        else 1
    )
    assert late.bytes <= (kept + 1 + extra) * summary
    assert streamed.bytes <= (2 * kept + extra) * summary if kept == 14 else streamed.bytes == late.bytes
    assert (early.bytes < late.bytes) == (kept == 14)


def test_the_merged_far_chunks_of_the_relative_form_are_all_still_read() -> None:
    operator = build(RELATIVE)
    with torch.no_grad():
        x = inputs(operator, 90, batch=1)
        moved = {name: value.clone() for name, value in x.items()}
        moved["v"][:, 0] += 1
        assert not torch.equal(stream(operator, x, 0)[:, 80:], stream(operator, moved, 0)[:, 80:])


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"chunk_size": 0}, "chunk_size"),
        ({"max_chunks": 2.5}, "max_chunks"),
        ({"extrapolation": "repeat"}, "extrapolation"),
        ({"mix_form": "relativ"}, "mix_form"),
        ({"mix_form": "relative", "mix_init": "local_row"}, "mix_init"),
        ({"mix_form": "relative", "extrapolation": "shift"}, "extrapolation"),
        ({"mix_clamp_at": "end"}, "mix_clamp_at"),
        ({"intra": "soft"}, "intra"),
        ({"decay": "layer"}, "decay"),
        ({"intra": "plain", "decay": "head"}, "decay"),
        ({"intra": "window", "decay": "head"}, "intra"),
        ({"decay_span": "sequence"}, "decay_span"),
        ({"normalizer": "slot"}, "normalizer"),
        ({"blocks": 4}, "blocks"),
    ],
    ids=str,
)
def test_a_wrong_option_is_refused_by_its_key(options: dict[str, Any], key: str) -> None:
    with refused(key) as error:
        build_attention({"name": "mhla", **options}, heads=2, dim_k=4, dim_v=4, causal=True)
    assert "\n" not in str(error.value)


def test_text_beyond_the_matrix_is_refused_at_once_and_while_streaming() -> None:
    operator = build(MHLA)
    x = inputs(operator, 41)
    with refused("extrapolation"):
        operator(**x)
    assert (
        operator(**x, documents=torch.tensor([[0] * 20 + [1] * 21] * 2)).shape == x["v"].shape
    )  # each document alone fits
    with torch.no_grad():
        _, state = operator.prefill(**cut(x, 0, 40))
        with refused("extrapolation"):
            operator.step(**cut(x, 40, 41), state=state)


@pytest.mark.parametrize(
    "entry", [MHLA, {"name": "linear", "chunk_size": 8}, {"name": "softmax"}, {"name": "deltanet"}], ids=label
)
def test_a_state_of_packed_documents_is_refused(entry: dict[str, Any]) -> None:
    operator = build(entry)
    with refused("documents"):
        operator.prefill(**inputs(operator, 6), packing=Packing(None, torch.tensor([[0, 0, 1, 1, 1, 1]] * 2)))


def test_a_gated_operator_names_what_it_needs() -> None:
    operator = build(MHLA | {"decay": "token"})
    x = inputs(operator, 5)
    with refused("log_decay"):
        operator(x["q"], x["k"], x["v"])


def test_causal_and_bidirectional_names_do_not_mix() -> None:
    with refused("name"):
        register_attention("mhla", CAUSAL_ATTENTION["mhla"])
    with refused("name"):
        build_attention("sofmax", heads=1, dim_k=4, dim_v=4, causal=True)
