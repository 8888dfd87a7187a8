"""Agreement of the video DiT with tensors of the authors' modules (SPEC section 6)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mhla_lightning.attention import MHLA, SelfAttention, dense_mhla
from mhla_lightning.backbones.layers import GridRotation, grid_turns, time_sinusoid
from mhla_lightning.backbones.video_dit import VIDEO_PRESETS, VideoDiT, VideoDiTOptions
from mhla_lightning.weights.wan_names import from_wan

Arrays = dict[str, Tensor]


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Within what oracles/README.md gives for whole models and video."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def group(arrays: Arrays, prefix: str) -> Arrays:
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}


def ours(arrays: Arrays, prefix: str) -> Arrays:
    """A layer's tensors by the authors' names under our layer's."""
    named = from_wan({f"blocks.0.self_attn.{name}": value for name, value in group(arrays, prefix).items()})
    return {name.removeprefix("blocks.0.attn."): value for name, value in named.items()}


def release_layer(options: dict[str, Any], grid: list[int]) -> SelfAttention:
    entry = {
        "name": "mhla",
        **VIDEO_PRESETS["release"]["mhla"],
        "blocks": options["block_layout"],
        "mix_init": options["transform"],
        "normalizer": "slot" if options["normalize_out"] else "none",
        "eps": options["eps"],
        "gate": options["is_gated"],
        "pos_conv": "lepe3" if options["is_lepe"] else "none",
        "qk_norm": options["qk_norm"],
    }
    return SelfAttention(options["dim"], options["num_heads"], attention=entry, grid=grid)


def check_video_layer(meta: dict[str, Any], arrays: Arrays) -> None:
    """Output, what is turned, the operator against the dense form, and gradients where the case has them."""
    grid = meta["grid"]
    layer = release_layer(meta["constructor"], grid)
    operator = layer.attention
    assert isinstance(operator, MHLA)
    state = ours(arrays, "param.")
    if meta["mixing"] == "init":
        torch.testing.assert_close(
            operator.mixing.weight, state["attention.mixing.weight"].float(), rtol=1e-5, atol=1e-7
        )
    layer.to(arrays["in.x"].dtype).load_state_dict(state)
    rotary = GridRotation(grid, layer.dim // layer.heads, torch.device("cpu"))
    x = arrays["in.x"].requires_grad_()
    y = layer(x, rotary=rotary)
    assert_close(y, arrays["out.y"])

    mid = group(arrays, "mid.")
    for name in ("q", "k"):
        torch.testing.assert_close(rotary(mid[name]), mid[f"{name}_rope"], rtol=1e-6, atol=1e-6)
    if operator.normalizer == "none":
        q, k, v = (mid[name].double().transpose(1, 2) for name in ("q_rope", "k_rope", "v"))
        dense = dense_mhla(
            q, k, v, operator.mixing.weight.double(), operator.grid.block_of_token, normalizer="none"
        ).transpose(1, 2)
        raw = layer.qkv(x).chunk(3, dim=-1)
        q, k, v = (
            t.unflatten(-1, (layer.heads, -1)) for t in (layer.q_norm(raw[0]), layer.k_norm(raw[1]), raw[2])
        )
        assert_close(operator(q, k, v, rotary=rotary), dense.to(x.dtype))
    if "in.cotangent" in arrays:
        parameters = dict(layer.named_parameters())
        grads = torch.autograd.grad((y * arrays["in.cotangent"]).sum(), [x, *parameters.values()])
        assert_close(grads[0], arrays["grad_in.x"])
        expected = ours(arrays, "grad.")
        assert expected.keys() == parameters.keys()
        for name, grad in zip(parameters, grads[1:], strict=True):
            assert_close(grad, expected[name])


def check_rope_tables(meta: dict[str, Any], arrays: Arrays) -> None:
    """Every axis alone: 64 positions along it, and its own columns of the table; then the time's sinusoid."""
    for dim in (int(name.rpartition("_d")[2]) for name in arrays if name.startswith("freqs_re_d")):
        table = torch.complex(arrays[f"freqs_re_d{dim}"], arrays[f"freqs_im_d{dim}"])
        pairs = dim // 2
        edges = [0, pairs - 2 * (pairs // 3), pairs - pairs // 3, pairs]
        for axis, (start, stop) in enumerate(zip(edges, edges[1:], strict=False)):
            grid = [1, 1, 1]
            grid[axis] = len(table)
            turns = grid_turns(grid, dim)[:, 0]
            torch.testing.assert_close(turns[:, start:stop], table[:, start:stop], rtol=1e-10, atol=1e-12)
            rest = torch.cat([turns[:, :start], turns[:, stop:]], dim=1)
            assert torch.equal(rest, torch.ones_like(rest))
    sinusoid = time_sinusoid(arrays["sinusoid_t"], 256, torch.float64)
    torch.testing.assert_close(sinusoid, arrays["sinusoid_256"], rtol=1e-10, atol=1e-11)


def check_wan(meta: dict[str, Any], arrays: Arrays) -> None:
    """A whole hybrid model with texts of different lengths."""
    options = meta["constructor"]
    latents = arrays["in.latents"]
    mhla = {
        "name": "mhla",
        "preset": "release",
        "gate": options["is_gated"],
        "blocks": options["block_layout"],
    }
    mhla |= {
        "normalizer": "slot" if options["norm_output"] else "none",
        "pos_conv": "lepe3" if options["is_lepe"] else "none",
    }
    attention = [
        mhla if layer in options["linear_attn_idx"] else "softmax" for layer in range(options["num_layers"])
    ]
    sizes = VideoDiTOptions(
        input_size=list(latents.shape[2:]),
        embed_dim=options["dim"],
        depth=options["num_layers"],
        text_length=options["text_len"],
        in_channels=options["in_dim"],
        **{key: options[key] for key in ("patch_size", "ffn_dim", "freq_dim", "text_dim", "num_heads")},
    )
    model = VideoDiT(attention, sizes).eval().to(latents.dtype)
    model.load_state_dict(model.adapt_state_dict(group(arrays, "param.")))
    texts = torch.zeros(len(latents), options["text_len"], options["text_dim"], dtype=latents.dtype)
    for row, text in zip(texts, [arrays[f"in.ctx{i}"] for i in range(len(latents))], strict=True):
        row[: len(text)] = text
    expected = arrays["out.y"]
    assert_close(model(latents, arrays["in.t"], texts), expected)
    for i in range(len(latents)):  # alone, and with its own text as it came
        text = arrays[f"in.ctx{i}"][None]
        assert_close(model(latents[i : i + 1], arrays["in.t"][i : i + 1], text), expected[i : i + 1])
