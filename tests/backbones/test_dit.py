"""The DiT backbone: sizes, positions, token order, initialisation, and every operator inside it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from mhla_lightning import backbones
from mhla_lightning.attention import ATTENTION
from mhla_lightning.backbones import IMAGE_DIFFUSION
from mhla_lightning.backbones.layers import time_sinusoid
from tests.helpers.errors import refused

TINY: dict[str, Any] = {"input_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
RELEASE = {"name": "mhla", "preset": "release"}
ENTRIES: list[Any] = [
    *ATTENTION,
    RELEASE,
    ["softmax", "mhla"],
    {"name": "linear", "pos_conv": "cpe3", "gate": True},
]


def build(name: str = "dit_s2", **options: Any) -> Any:
    """Untyped on purpose: the tests look inside."""
    return backbones.build_backbone(name, **{**TINY, **options})


def awake(model: Any, seed: int = 0) -> Any:
    """Every parameter random, mixing matrices positive: at its initialisation a DiT is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(
                torch.randn(parameter.shape, generator=generator) * 0.1 if "mixing" not in name else parameter
            )
    return model.eval()


def inputs(model: Any, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, model.in_channels, *model.input_size, generator=generator)
    return x, torch.tensor([7, 900])[:batch], torch.tensor([0, model.num_classes])[:batch]


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("dit_s2", 32_923_424), ("dit_b2", 130_429_472), ("dit_l2", 458_141_728), ("dit_xl2", 675_228_960)],
    ids=str,
)
def test_preset_release_has_the_released_parameter_counts(name: str, parameters: int) -> None:
    """SPEC 4.1: trainable ones; the positions come on top, in the state dict."""
    with torch.device("meta"):
        model: Any = backbones.build_backbone(name, attention=RELEASE)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert all(p.requires_grad for p in model.parameters())
    assert model.state_dict()["pos_embed"].shape == (1, 256, model.embed_dim)


def test_every_size_and_patch_has_a_name() -> None:
    assert set(IMAGE_DIFFUSION) == {
        f"dit_{size}{patch}" for size in ("s", "b", "l", "xl") for patch in (2, 4, 8)
    }
    for name in IMAGE_DIFFUSION:
        with torch.device("meta"):
            model: Any = backbones.build_backbone(name)
        assert model.grid == (32 // int(name[-1]),) * 2


@pytest.mark.parametrize("attention", ENTRIES, ids=str)
@pytest.mark.parametrize(("input_size", "grid"), [(16, (8, 8)), (32, (16, 16)), ((16, 24), (8, 12))], ids=str)
def test_shapes_and_flops(attention: Any, input_size: Any, grid: tuple[int, int]) -> None:
    with torch.device("meta"):
        model = build(attention=attention, input_size=input_size).eval()
        x = torch.empty(1, 4, *model.input_size)
        t, y = torch.empty(1), torch.empty(1, dtype=torch.int64)
    assert model.grid == grid
    with FlopCounterMode(display=False) as counter:
        assert model(x, t, y).shape == (1, 8, *model.input_size)
    assert counter.get_total_flops() == model.flops(grid)


def test_dwconv_counts_its_flops() -> None:
    plain, with_conv = (build(attention=RELEASE, dwconv=given) for given in (False, True))
    assert with_conv.flops((8, 8)) - plain.flops((8, 8)) == 2 * 2 * 64 * 24 * 9


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_output_is_zero_at_the_start_whatever_goes_in(learn_sigma: bool) -> None:
    model = build(learn_sigma=learn_sigma, in_channels=3, patch_size=4)
    out = model(*inputs(model))
    assert out.shape == (2, 6 if learn_sigma else 3, 16, 16)
    assert torch.equal(out, torch.zeros_like(out))
    model.final_layer.linear.weight.data.normal_()
    final = model(*inputs(model))
    assert final.abs().max() > 0.1  # the output layer was what held it back


@pytest.mark.parametrize("attention", ENTRIES, ids=str)
def test_blocks_are_the_identity_at_the_start(attention: Any) -> None:
    """adaLN-zero, and zero cpe or identity dwconv, so that a fresh block changes nothing."""
    model = build(attention=attention, dwconv=True).eval()
    x, condition = torch.randn(2, 64, 24), torch.randn(2, 24)
    for block in model.blocks:
        torch.testing.assert_close(block(x, condition), x)


def test_lepe_starts_as_the_identity() -> None:
    """SPEC 4.2: odd convolutions have one centre tap, so LePE adds v."""
    layer = build(attention=RELEASE).blocks[0].attn
    v = torch.randn(2, 64, 24)
    torch.testing.assert_close(layer.lepe(v, (8, 8)), v)


def test_initial_weights_follow_the_spec() -> None:
    model = backbones.build_backbone("dit_s2", depth=1)
    weights = model.state_dict()
    assert all(not value.any() for name, value in weights.items() if name.endswith("bias"))
    for name in ("t_embedder.mlp.0.weight", "t_embedder.mlp.2.weight", "y_embedder.embedding_table.weight"):
        assert weights[name].std() == pytest.approx(0.02, rel=0.02)
    for name in (
        "blocks.0.attn.qkv.weight",
        "blocks.0.attn.proj.weight",
        "blocks.0.mlp.fc1.weight",
        "blocks.0.attn.gate.weight",
    ):
        rows, columns = weights[name].shape
        bound = (6 / (rows + columns)) ** 0.5
        assert weights[name].abs().max() <= bound
        assert weights[name].std() == pytest.approx(bound / 3**0.5, rel=0.02)
    patch = weights["x_embedder.proj.weight"]
    assert patch.std() == pytest.approx((2 / (384 + 4 * 2 * 2)) ** 0.5, rel=0.05)


def test_positions_are_those_of_the_public_dit() -> None:
    """Its formula in numpy: the first half of the channels holds the column, the second the row."""
    rows, columns, dim = 3, 5, 24
    omega = 1.0 / 10000 ** (np.arange(dim // 4, dtype=np.float64) / (dim / 4.0))
    column, row = np.meshgrid(np.arange(columns, dtype=np.float32), np.arange(rows, dtype=np.float32))
    halves = []
    for position in (column, row):
        angle = np.einsum("m,d->md", position.reshape(-1), omega)
        halves.append(np.concatenate([np.sin(angle), np.cos(angle)], axis=1))
    expected = np.concatenate(halves, axis=1)
    ours = build(input_size=(6, 10), attention="softmax").pos_embed
    np.testing.assert_allclose(ours[0].numpy(), expected, rtol=0, atol=1e-7)


def test_times_are_embedded_in_float32_whatever_they_come_as() -> None:
    t = torch.tensor([0, 3, 999])
    expected = np.concatenate(
        [f(t[:, None].numpy() * np.exp(-np.log(10000.0) * np.arange(128) / 128)) for f in (np.cos, np.sin)],
        axis=1,
    )
    for given in (t, t.float(), t.double()):
        sinusoid = time_sinusoid(given, 256)
        assert sinusoid.dtype == torch.float32
        np.testing.assert_allclose(
            sinusoid.numpy(), expected, atol=2e-4
        )  # float32 angles of up to 999 radians


@pytest.mark.parametrize(
    "attention", ["softmax", "linear", {"name": "mhla", "blocks": 1, "pos_conv": "none"}], ids=str
)
def test_moving_the_image_by_patches_moves_the_output(attention: Any) -> None:
    """Without positions: tokens go out where they came in."""
    model = awake(build(attention=attention, patch_size=4, in_channels=3))
    model.pos_embed.zero_()
    x, t, y = inputs(model)
    moved = model(x.roll((8, 4), (2, 3)), t, y)
    torch.testing.assert_close(moved, model(x, t, y).roll((8, 4), (2, 3)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("preset", ["paper", "release"])
def test_shuffling_whole_blocks_moves_the_output_when_all_blocks_are_equally_far(preset: str) -> None:
    """With a uniform mixing matrix no block stands out, so exchanging two rows of blocks exchanges their
    outputs: block order does not leak.
    """
    model = awake(
        build(attention={"name": "mhla", "preset": preset, "mix_init": "uniform", "pos_conv": "none"})
    )
    model.pos_embed.zero_()
    x, t, y = inputs(model)
    block = 16 // model.blocks[0].attn.attention.grid.blocks[0]
    torch.testing.assert_close(
        model(x.roll(block, 2), t, y), model(x, t, y).roll(block, 2), rtol=1e-4, atol=1e-5
    )


def test_a_patch_goes_out_row_column_channel() -> None:
    """SPEC 4.2: the output layer's numbers are (row in the patch, column in the patch, channel)."""
    model = awake(build(attention="softmax", input_size=(6, 8), learn_sigma=False))
    x, t, y = inputs(model)
    seen: dict[str, torch.Tensor] = {}
    model.final_layer.register_forward_hook(lambda module, args, out: seen.update(out=out))
    image = model(x, t, y)
    torch.testing.assert_close(
        image, rearrange(seen["out"], "b (h w) (p q c) -> b c (h p) (w q)", h=3, w=4, p=2, q=2, c=4)
    )


def test_linear_is_mhla_with_one_block() -> None:
    """The baseline differs from ours in the blocks alone (SPEC 1.6)."""
    linear = awake(build(attention="linear"))
    mhla = awake(build(attention={"name": "mhla", "blocks": 1, "pos_conv": "none", "gate": False}))
    mhla.load_state_dict(linear.state_dict(), strict=False)
    torch.testing.assert_close(mhla(*inputs(mhla)), linear(*inputs(linear)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("pos_conv", "gate"), [("none", False), ("cpe3", False), ("none", True), ("cpe3", True), ("lepe3", False)]
)
def test_the_papers_ablation_is_one_option_each(pos_conv: str, gate: bool) -> None:
    names = {
        name
        for name, _ in build(attention={"name": "mhla", "pos_conv": pos_conv, "gate": gate})
        .blocks[0]
        .named_parameters()
    }
    assert any(name.startswith("cpe.") for name in names) == (pos_conv == "cpe3")
    assert any(name.startswith("attn.lepe.") for name in names) == (pos_conv == "lepe3")
    assert any(name.startswith("attn.gate.") for name in names) == gate
    paper = {name for name, _ in build().blocks[0].named_parameters()}
    assert (paper == names) == (pos_conv == "cpe3" and gate)


def test_cpe_acts_after_both_residuals_on_the_raster_grid() -> None:
    options: dict[str, Any] = {"input_size": (16, 24), "depth": 1}
    plain = awake(build(attention={"name": "mhla", "pos_conv": "none"}, **options)).blocks[0]
    block = awake(build(attention={"name": "mhla", "pos_conv": "cpe3"}, **options)).blocks[0]
    block.load_state_dict(plain.state_dict(), strict=False)
    x, condition = torch.randn(2, 96, 24), torch.randn(2, 24)
    before = plain(x, condition)
    image = rearrange(before, "b (h w) c -> b c h w", h=8, w=12)
    conv = block.cpe.depthwise.conv
    expected = image + F.conv2d(image, conv.weight, conv.bias, padding=1, groups=24)
    torch.testing.assert_close(
        block(x, condition), rearrange(expected, "b c h w -> b (h w) c"), rtol=1e-4, atol=1e-5
    )


def test_dwconv_is_the_releases_on_tokens_in_block_order() -> None:
    """SPEC D6: blocks one after another, laid out as a square, one 3x3 without residual, and back."""
    model = awake(build(attention={**RELEASE, "block_size": 2}, dwconv=True, depth=1))
    block = model.blocks[0]
    plain = awake(build(attention={**RELEASE, "block_size": 2}, depth=1)).blocks[0]
    plain.load_state_dict(block.state_dict(), strict=False)
    x, condition = torch.randn(2, 64, 24), torch.randn(2, 24)
    sequence = rearrange(plain(x, condition), "b (h p w q) c -> b c (h w p q)", h=4, w=4, p=2, q=2)
    conv = block.dw_conv.conv
    expected = F.conv2d(sequence.unflatten(2, (8, 8)), conv.weight, conv.bias, padding=1, groups=24).flatten(
        2
    )
    expected = rearrange(expected, "b c (h w p q) -> b (h p w q) c", h=4, w=4, p=2, q=2)
    torch.testing.assert_close(block(x, condition), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_parameters_of_any_dtype(dtype: torch.dtype) -> None:
    model = awake(build())
    wanted = model(*inputs(model))
    out = model.to(dtype)(*inputs(model))
    assert out.dtype == dtype
    assert (out.float() - wanted).abs().max() < (
        0.05 if dtype == torch.bfloat16 else 1e-4
    ) * wanted.abs().max()


@pytest.mark.slow  # test_compiling.py: compiled tasks train alike
@pytest.mark.parametrize("attention", ENTRIES, ids=str)
def test_compiled_as_one_graph_it_gives_the_same(attention: Any) -> None:
    model = awake(build(attention=attention))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs(model)), model(*inputs(model)), rtol=1e-4, atol=1e-5)


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    grads = []
    for checkpointing in (False, True):
        model = awake(build(attention={**RELEASE, "dropout": 0.0})).train()
        model.set_grad_checkpointing(checkpointing)
        model(*inputs(model)).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert all(grad.any() for grad in grads[0])


def test_no_weight_decay_names_are_the_mixing_matrices() -> None:
    model = build(attention=["softmax", "mhla"])
    assert model.no_weight_decay() == {"blocks.1.attn.attention.mixing.weight"}
    assert model.no_weight_decay() <= dict(model.named_parameters()).keys()


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"input_size": 33}, "input_size"),
        ({"input_size": (16, 1)}, "input_size"),
        ({"input_size": (16, 16, 16)}, "input_size"),
        ({"patch_size": 0}, "patch_size"),
        ({"embed_dim": 30}, "embed_dim"),
        ({"num_heads": 5}, "num_heads"),
        ({"num_classes": 0}, "num_classes"),
        ({"attention": {"name": "mhla", "blocks": 5}}, "attention.blocks"),
        ({"attention": {"name": "mhla", "gated": True}}, "attention.gated"),
        ({"attention": {**RELEASE, "blocks": 3}}, "attention.normalizer"),
        ({"attention": {"name": "mhla", "blocks": 3}, "dwconv": True}, "dwconv"),
        ({"input_size": (16, 24), "dwconv": True}, "dwconv"),
        ({"hidden_size": 24}, "hidden_size"),
    ],
    ids=str,
)
def test_wrong_options_are_one_clear_sentence(options: dict, key: str) -> None:
    with refused(key) as error:
        build(**options)
    assert "\n" not in str(error.value)


def test_short_last_blocks_are_allowed() -> None:
    model = awake(build(attention={"name": "mhla", "blocks": 3}))
    assert model.blocks[0].attn.attention.grid.num_blocks == 9
    assert model(*inputs(model)).isfinite().all()


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"x": torch.zeros(2, 3, 16, 16)}, "x"),
        ({"x": torch.zeros(2, 4, 16, 32)}, "x"),
        ({"t": torch.tensor(7)}, "t"),
        ({"y": torch.zeros(3, dtype=torch.int64)}, "y"),
        ({"y": torch.tensor([0, 6])}, "y"),
        ({"y": torch.tensor([-1, 0])}, "y"),
    ],
    ids=lambda value: str(list(value)) if isinstance(value, dict) else "",
)
def test_wrong_inputs_are_one_clear_sentence(change: dict[str, torch.Tensor], key: str) -> None:
    model = build()
    x, t, y = inputs(model)
    with refused(key) as error:
        model(**{"x": x, "t": t, "y": y, **change})
    assert "\n" not in str(error.value)
