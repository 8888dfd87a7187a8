"""The contract of the causal layer around any operator, and small layers to check it on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mhla_lightning.attention import CausalSelfAttention, Packing
from mhla_lightning.backbones.rotary import rotations

DIM, TOKENS = 32, 40
SMALL: dict[str, dict[str, Any]] = {
    "softmax": {},
    "linear": {"chunk_size": 8},
    "deltanet": {"chunk_size": 8},
    "mhla": {"chunk_size": 8, "max_chunks": 6},
}


LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped": {"kv_heads": 2},
    "conv": {"short_conv": 4, "gate": False, "qk_norm": True, "qkv_bias": True},
    "conv, grouped": {"short_conv": 3, "kv_heads": 1, "out_norm": False, "rotary": False},
}


def build(name: str, **options: Any) -> CausalSelfAttention:
    torch.manual_seed(0)
    entry = {"name": name, **SMALL.get(name, {}), "heads": 4, **options}
    return CausalSelfAttention(DIM, attention=entry).double()


def tokens(batch: int = 2, count: int = TOKENS) -> Tensor:
    return torch.randn(batch, count, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def turn(layer: CausalSelfAttention, positions: Tensor) -> Any:
    return rotations(positions, [layer.dim_k], 10000.0, torch.float64)[layer.dim_k]


def run(layer: CausalSelfAttention, x: Tensor, packing: Packing | None = None) -> Tensor:
    positions = torch.arange(x.shape[1])[None] if packing is None else packing.positions
    return layer(x, rotary=turn(layer, positions), packing=packing)


def check_causality(name: str, layer_options: dict[str, Any]) -> None:
    layer, x = build(name, **layer_options), tokens()
    before = run(layer, x)
    for t in (0, 7, 8, 25, TOKENS - 1):
        moved = x.clone()
        moved[:, t] += 1
        change = (run(layer, moved) - before).abs().amax(-1)
        assert change[:, :t].sum() == 0
        assert change[:, t].max() > 0
        assert t + 1 == TOKENS or change[:, t + 1 :].max() > 0


def check_packing(name: str, layer_options: dict[str, Any]) -> None:
    layer, x = build(name, **layer_options), tokens()
    documents = torch.tensor([[0] * 3 + [1] * 20 + [2] * 17, [5] * 30 + [5] * 2 + [-1] * 8])
    mask = documents >= 0
    packed = run(layer, x, Packing(mask, documents))
    for row, start, stop in ((0, 0, 3), (0, 3, 23), (0, 23, 40), (1, 0, 32)):
        alone = run(layer, x[row : row + 1, start:stop])
        torch.testing.assert_close(packed[row : row + 1, start:stop], alone, rtol=1e-10, atol=1e-12)
    left = torch.arange(TOKENS).expand(2, -1) >= torch.tensor([[5], [0]])
    torch.testing.assert_close(
        run(layer, x, Packing(left, None))[:1, 5:], run(layer, x[:1, 5:]), rtol=1e-10, atol=1e-12
    )


def check_streaming(name: str, layer_options: dict[str, Any], prompt: int, padding: str) -> None:
    layer, x = build(name, **layer_options), tokens()
    expected = run(layer, x)
    packing, given, spare = None, x[:, :prompt], 5
    if padding != "none":
        other = torch.full((2, spare, DIM), 3.0, dtype=torch.float64)
        given = torch.cat([other, given] if padding == "left" else [given, other], 1)
        places = torch.arange(given.shape[1]).expand(2, -1)
        packing = Packing(places >= spare if padding == "left" else places < prompt, None)
    positions = torch.arange(prompt)[None] if packing is None else packing.positions
    out, state = layer.prefill(given, rotary=turn(layer, positions), packing=packing)
    outs = [out[:, spare:] if padding == "left" else out[:, :prompt]]
    for t in range(prompt, TOKENS):
        out, state = layer.step(x[:, t : t + 1], state, rotary=turn(layer, torch.full((2, 1), t)))
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), expected, rtol=1e-10, atol=1e-12)


def check_steps_from_nothing(name: str, layer_options: dict[str, Any]) -> None:
    layer, x = build(name, **layer_options), tokens(3, 12)
    expected, state = run(layer, x), layer.init_state(3)
    order = torch.arange(3)
    assert state.bytes >= 0
    for t in range(12):
        if t == 5:
            order = torch.tensor([2, 0, 0, 1])
            state = state.reorder(order)
        out, state = layer.step(
            x[order, t : t + 1], state, rotary=turn(layer, torch.full((len(order), 1), t))
        )
        torch.testing.assert_close(out[:, 0], expected[order, t], rtol=1e-10, atol=1e-12)
    assert state.bytes >= sum(kept.nbytes for kept in state.inputs)
    assert len(state.inputs) == (3 if layer_options.get("short_conv") else 0)
