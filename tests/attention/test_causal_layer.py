"""The causal layer around every operator: causality, packing, streaming, short convolution, grouped
queries, decay, FLOPs.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mhla_lightning.attention import CausalSelfAttention, Packing
from mhla_lightning.attention.baselines.causal_conv import ShortConvolution
from mhla_lightning.backbones.rotary import rotations
from tests.helpers import causal_layers as layer_contract
from tests.helpers.causal_layers import DIM, LAYERS, build, run, tokens
from tests.helpers.errors import refused
from tests.helpers.language_models import OPERATORS_ON_CPU
from tests.helpers.marks import every_nth

every_layer = pytest.mark.parametrize("layer_options", LAYERS.values(), ids=LAYERS)
every_operator = pytest.mark.parametrize("name", OPERATORS_ON_CPU)


@every_operator
@every_layer
def test_nothing_before_a_token_sees_it(name: str, layer_options: dict[str, Any]) -> None:
    layer_contract.check_causality(name, layer_options)


@every_operator
@every_layer
def test_packed_documents_and_padding_give_what_each_document_gives_alone(
    name: str, layer_options: dict[str, Any]
) -> None:
    layer_contract.check_packing(name, layer_options)


@every_operator
@every_layer
@pytest.mark.parametrize("prompt", every_nth([8, 1, 2, 39, 21], 3))
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_prefill_and_steps_equal_forward(
    name: str, layer_options: dict[str, Any], prompt: int, padding: str
) -> None:
    layer_contract.check_streaming(name, layer_options, prompt, padding)


@every_operator
@every_layer
def test_steps_from_nothing_and_another_order_of_sequences(name: str, layer_options: dict[str, Any]) -> None:
    layer_contract.check_steps_from_nothing(name, layer_options)


@pytest.mark.parametrize("width", [2, 4, 7])
def test_short_convolution_is_a_causal_depthwise_convolution(width: int) -> None:
    torch.manual_seed(0)
    conv, x = ShortConvolution(6, width).double(), torch.randn(2, 5, 6, dtype=torch.float64)
    padded = torch.nn.functional.pad(x.mT, (width - 1, 0))
    expected = torch.nn.functional.conv1d(padded, conv.weight[:, None], groups=6).mT
    torch.testing.assert_close(conv(x), expected)
    kept = conv.last_inputs(x)
    assert kept.shape == (2, width - 1, 6)
    torch.testing.assert_close(kept[:, -1], x[:, -1])
    assert kept[:, : max(0, width - 1 - 5)].abs().sum() == 0


def test_short_convolution_starts_anew_with_each_document() -> None:
    torch.manual_seed(0)
    conv, x = ShortConvolution(6, 4).double(), torch.randn(1, 9, 6, dtype=torch.float64)
    documents = torch.tensor([[0, 0, 1, 2, 2, 2, 2, 2, 2]])
    out = conv(x, Packing(None, documents))
    assert not torch.allclose(out, conv(x))
    for start, stop in ((0, 2), (2, 3), (3, 9)):
        torch.testing.assert_close(out[:, start:stop], conv(x[:, start:stop]))


def test_what_a_prefill_keeps_for_the_convolution_ends_at_the_last_real_token() -> None:
    conv, x = ShortConvolution(1, 4), torch.arange(1.0, 7).view(1, 6, 1).expand(3, -1, -1)
    mask = torch.tensor([[1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]]).bool()
    kept = conv.last_inputs(x, Packing(mask, None))[..., 0]
    assert kept.tolist() == [[0, 1, 2], [4, 5, 6], [0, 0, 0]]


@pytest.mark.parametrize("name", ["linear", "mhla"])
def test_heads_start_with_decays_of_their_own(name: str) -> None:
    layer = CausalSelfAttention(DIM, attention={"name": name, "decay": "token", "heads": 4})
    assert layer.decay is not None
    spans = 1 / (1 - torch.sigmoid(layer.decay.bias.detach()))
    torch.testing.assert_close(spans, torch.tensor([4.0, 16.0, 64.0, 256.0]), rtol=1e-4, atol=0.0)
    assert layer.decay.weight.abs().sum() == 0
    run(layer.double(), tokens()).square().sum().backward()
    assert layer.decay.weight.grad is not None
    assert layer.decay.weight.grad.abs().sum() > 0


@every_operator
@every_layer
@pytest.mark.parametrize("count", [64, 200])
def test_flops_are_what_torch_counts(name: str, layer_options: dict[str, Any], count: int) -> None:
    with torch.device("meta"):
        layer, x = (
            CausalSelfAttention(64, attention={"name": name, "heads": 4, **layer_options}),
            torch.empty(1, count, 64),
        )
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == layer.flops(count) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_operator
def test_autocast_and_low_precision_stay_near_float64(name: str, dtype: torch.dtype) -> None:
    layer, x = build(name, short_conv=4), tokens()
    expected = run(layer, x)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = run(layer.float(), x.float())
    difference = float((out.detach().double() - expected.detach()).norm() / expected.detach().norm())
    assert difference < (1e-5 if dtype == torch.float32 else 3e-2)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"heads": 5}, "attention.heads"),
        ({"heads": 4, "kv_heads": 3}, "attention.kv_heads"),
        ({"heads": 16}, "attention.heads"),
        ({"short_conv": 1}, "attention.short_conv"),
        ({"name": "sofmax"}, "attention.name"),
        ({"expand_v": 0.01}, "attention.heads"),
        ({"gates": True}, "attention.gates"),
        ({"name": "mhla", "chunk_size": 0}, "attention.chunk_size"),
    ],
    ids=str,
)
def test_a_wrong_option_is_refused_by_its_key(options: dict[str, Any], key: str) -> None:
    with refused(key) as error:
        CausalSelfAttention(DIM, attention={"name": "softmax", **options})
    assert "\n" not in str(error.value)


def test_rotary_scores_depend_on_distance_alone() -> None:
    """The point of rotary, and of starting positions anew: q_t . k_s is a function of t - s."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 8, dtype=torch.float64)

    def score(t: int, s: int) -> float:
        at = [rotations(torch.tensor([[p]]), [8], 100.0, torch.float64)[8] for p in (t, s)]
        return float((at[0](q.view(1, 1, 1, 8)) * at[1](k.view(1, 1, 1, 8))).sum())

    assert score(9, 4) == pytest.approx(score(105, 100), rel=1e-12)
    assert score(9, 4) != pytest.approx(score(9, 5), rel=1e-3)
    assert score(3, 3) == pytest.approx(float(q @ k), rel=1e-12)
    assert math.isfinite(score(10**6, 0))
