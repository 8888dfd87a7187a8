"""SANA's transformer: that it is diffusers', its sizes, its options, and every operator inside it."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mhla_lightning import backbones
from mhla_lightning.attention import ATTENTION
from mhla_lightning.backbones import TEXT_TO_IMAGE
from mhla_lightning.weights.sana_names import added_to_sana, needed_by_sana, to_diffusers_sana
from tests.helpers.errors import refused
from tests.helpers.sana_models import ENTRIES, FULL, build, texts, theirs
from tests.helpers.video_models import awake


@pytest.mark.parametrize(
    ("patch_size", "bias", "masked"),
    [(1, False, True), (2, True, False)],
    ids=["sana with a mask", "patches of 2 and biases"],
)
def test_it_is_sana_as_diffusers_has_it(patch_size: int, bias: bool, masked: bool) -> None:
    """Linear layers, every parameter random: outputs and all gradients."""
    model = awake(build(attention={"name": "linear", "qkv_bias": bias}, patch_size=patch_size))
    other = theirs(bias, patch_size=patch_size)
    other.load_state_dict(to_diffusers_sana(model.state_dict()))
    x, t, text, mask = texts(model)
    ours = model(x, t, text, mask if masked else None)
    mask_of_theirs = {"encoder_attention_mask": mask} if masked else {}
    wanted = other(x, text, t, return_dict=False, **mask_of_theirs)[0]
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5 * float(wanted.detach().abs().max()))

    cotangent = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2))
    (ours * cotangent).sum().backward()
    (wanted * cotangent).sum().backward()
    gradients = to_diffusers_sana({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, parameter in other.named_parameters():
        if name.endswith("attn2.to_k.bias"):  # moves all scores of a query alike, which softmax does not see
            assert max(gradients[name].abs().max(), parameter.grad.abs().max()) < 1e-6
            continue
        assert gradients[name].any(), name
        torch.testing.assert_close(
            gradients[name], parameter.grad, rtol=1e-4, atol=1e-4 * float(parameter.grad.abs().max())
        )


def test_mhla_that_mixes_all_blocks_alike_is_the_linear_attention_that_it_replaces() -> None:
    model = awake(build(attention={"name": "mhla", "mix_init": "uniform", "blocks": (3, 4)}))
    linear = build(attention="linear").eval()
    linear.load_state_dict(
        {name: value for name, value in model.state_dict().items() if "mixing" not in name}
    )
    for block in model.blocks:
        block.attn.attention.mixing.weight.data.fill_(1 / 12)
    torch.testing.assert_close(model(*texts(model)), linear(*texts(model)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        (
            "sana_600m",
            {
                "num_attention_heads": 36,
                "num_layers": 28,
                "num_cross_attention_heads": 16,
                "cross_attention_head_dim": 72,
                "cross_attention_dim": 1152,
            },
        ),
        ("sana_1600m", {}),
    ],
)
def test_public_sizes_have_every_tensor_of_diffusers(name: str, sizes: dict[str, int]) -> None:
    with torch.device("meta"):
        model: Any = backbones.build_backbone(name, attention="linear")
        wanted = diffusers.SanaTransformer2DModel(**sizes).state_dict()
    found = to_diffusers_sana(model.state_dict())
    assert {key: value.shape for key, value in found.items()} == {
        key: value.shape for key, value in wanted.items()
    }
    parameters = sum(value.numel() for value in wanted.values())
    assert parameters == {"sana_600m": 591_747_872, "sana_1600m": 1_604_462_752}[name]
    assert model.grid == (32, 32)
    assert needed_by_sana(len(model.blocks), qkv_bias=False) == list(
        dict.fromkeys(needed_by_sana(len(model.blocks), qkv_bias=False))
    )
    assert set(needed_by_sana(len(model.blocks), qkv_bias=False)) == set(model.state_dict())


def test_mhla_has_16_blocks_on_the_latents_of_1024_pixels() -> None:
    with torch.device("meta"):
        linear, mhla = (backbones.build_backbone("sana_600m", attention=name) for name in ("linear", "mhla"))
    more = set(mhla.state_dict()) - set(linear.state_dict())
    assert more == {f"blocks.{i}.attn.attention.mixing.weight" for i in range(28)}
    assert {mhla.state_dict()[name].shape for name in more} == {(16, 16)}
    assert all(added_to_sana(name) for name in more)
    assert not any(added_to_sana(name) for name in linear.state_dict())


@pytest.mark.parametrize("name", TEXT_TO_IMAGE)
@pytest.mark.parametrize("attention", ENTRIES, ids=str)
def test_shapes_and_flops_of_every_size(name: str, attention: Any) -> None:
    with torch.device("meta"):
        model: Any = backbones.build_backbone(name, attention=attention, depth=2)
        x, t = torch.empty(1, model.in_channels, *model.input_size), torch.empty(1)
        text = torch.empty(1, model.text_length, model.text_dim)
        with FlopCounterMode(display=False) as counter:
            assert model(x, t, text).shape == x.shape
    assert counter.get_total_flops() == model.flops(model.grid)


def test_rows_that_the_mask_leaves_out_change_nothing() -> None:
    model = awake(build(attention="mhla"))
    x, t, text, mask = texts(model)
    other = text.masked_fill(~mask[..., None], 7.0)
    assert torch.equal(model(x, t, text, mask), model(x, t, other, mask))
    assert (model(x, t, text) - model(x, t, other)).abs().max() > 1e-3
    alone = model(x[:1], t[:1], text[:1, :2])
    torch.testing.assert_close(model(x, t, text, mask)[:1], alone, rtol=1e-4, atol=1e-5)


def test_a_text_without_a_real_row_adds_a_constant() -> None:
    model = awake(build(attention="mhla"))
    x, t, text, mask = texts(model)
    none = torch.zeros_like(mask)
    out = model(x, t, text, none)
    assert torch.equal(out, model(x, t, torch.randn_like(text), none))
    out.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_the_convolution_of_the_feed_forward_can_be_dropped() -> None:
    kept, dropped = build(attention="linear"), awake(build(attention="linear", ffn_conv=False))
    missing = set(kept.state_dict()) - set(dropped.state_dict())
    assert missing == {
        f"blocks.{i}.ffn.depthwise.conv.{leaf}" for i in range(2) for leaf in ("weight", "bias")
    }
    # nothing else knows where a token is: moved pixels give the same output, moved
    x, t, text, mask = texts(dropped)
    moved = dropped(x.roll(3, -1).flip(-2), t, text, mask)
    torch.testing.assert_close(moved, dropped(x, t, text, mask).roll(3, -1).flip(-2), rtol=1e-3, atol=1e-5)
    kept = awake(kept)
    difference = kept(x.roll(3, -1), t, text, mask) - kept(x, t, text, mask).roll(3, -1)
    assert difference.abs().max() > 1e-3


@pytest.mark.parametrize("size", [(4, 8), (12, 20), (8, 6)], ids=str)
def test_images_of_other_sizes(size: tuple[int, int]) -> None:
    """The same weights laid out for that size give the same numbers."""
    entry = {"name": "mhla", "blocks": (2, 2)}
    model = awake(build(attention=entry))
    own = build(attention=entry, input_size=size).eval()
    own.load_state_dict(model.state_dict())
    _, t, text, mask = texts(model)
    x = torch.randn(2, 3, *size)
    assert torch.equal(model(x, t, text, mask), own(x, t, text, mask))
    assert model.flops(model.check_size(size)) == own.flops(own.grid)


def test_a_size_that_does_not_fit_names_the_nearest() -> None:
    model = build(attention={"name": "mhla", "blocks": (3, 4)})
    with refused("shape") as error:
        model.check_size((8, 9))
    assert "blocks (3, 4): width 9; use 8 or 10" in str(error.value)
    with refused("shape"):
        model.check_size((8, 12, 4))
    assert build(attention="linear").check_size((3, 100)) == (3, 100)


@pytest.mark.parametrize(
    ("key", "options"),
    [
        ("input_size", {"input_size": (8, 12, 4)}),
        ("input_size", {"input_size": (8, 0)}),
        ("input_size", {"input_size": 9, "patch_size": 2}),
        ("patch_size", {"patch_size": (1, 2, 2)}),
        ("num_heads", {"num_heads": 5}),
        ("cross_heads", {"cross_heads": 5}),
        ("cross_heads", {"cross_heads": 0}),
        ("mlp_ratio", {"mlp_ratio": 0.01}),
        ("depth", {"depth": 0}),
        ("text_dim", {"text_dim": 0}),
        ("depth", {"depth": 10**9}),
        ("depth", {"depth": 2.0}),
        ("num_heads", {"num_heads": "3"}),
        ("embed_dim", {"embed_dim": 24.0}),
        ("input_size", {"input_size": 10**9}),
        ("input_size", {"input_size": "88"}),
        ("patch_size", {"patch_size": (1.0, 1.0)}),
        ("in_channels", {"in_channels": None}),
        ("text_length", {"text_length": 10**9}),
        ("mlp_ratio", {"mlp_ratio": "2.5"}),
        ("mlp_ratio", {"mlp_ratio": 1e9}),
        ("mlp_ratio", {"mlp_ratio": float("nan")}),
        ("ffn_conv", {"ffn_conv": "no"}),
        ("attention.blocks", {"attention": {"name": "mhla", "blocks": (5, 5)}}),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_refused(key: str, options: dict[str, Any]) -> None:
    with refused(key):
        build(**options)


@pytest.mark.parametrize("key", ["x", "t", "text", "text_mask"])
def test_inputs_that_do_not_fit_are_refused(key: str) -> None:
    model = build(attention="linear")
    given = dict(zip(("x", "t", "text", "text_mask"), texts(model), strict=True))
    given[key] = given[key][:1, :1] if key != "t" else given[key][:1]
    with refused(key):
        model(**given)


@pytest.mark.parametrize("attention", [*ATTENTION, FULL], ids=str)
def test_every_operator_trains_on_the_tiny_size(attention: Any) -> None:
    """The output starts at zero, so only the head moves in the first step, and every parameter by the third.

    Recomputed activations give the same losses.
    """
    runs = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model: Any = backbones.build_backbone("sana_tiny", attention=attention, depth=2, input_size=16)
        model.set_grad_checkpointing(checkpointing)
        assert not model(*texts(model)).any()
        before = {name: value.clone() for name, value in model.named_parameters()}
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)
        x, t, text, mask = texts(model)
        target = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
        losses = []
        for _ in range(3):
            loss = (model(x, t, text, mask) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] > losses[1] > losses[2]
        assert [name for name, value in model.named_parameters() if torch.equal(value, before[name])] == []
        runs.append(losses)
    assert runs[0] == runs[1]


@pytest.mark.parametrize("attention", ["linear", FULL], ids=str)
def test_bfloat16_and_autocast_are_near_float32(attention: Any) -> None:
    model = awake(build(attention=attention))
    wanted = model(*texts(model))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(*texts(model))
    whole = model.to(torch.bfloat16)(*texts(model))
    assert (mixed.dtype, whole.dtype) == (torch.float32, torch.bfloat16)
    for out in (mixed, whole.float()):
        assert (out - wanted).abs().max() < 0.05 * wanted.abs().max()


def test_initial_weights_are_those_of_sana() -> None:
    """Embeddings N(0, 0.02), Linears Xavier-uniform, the convolution of the feed-forward as in torch."""
    weights = build("sana_tiny", depth=1, embed_dim=256, num_heads=8, text_dim=128).state_dict()
    for name in ("text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2"):
        assert weights[f"{name}.weight"].std() == pytest.approx(0.02, rel=0.03)
    for name in ("attn.qkv", "cross_attn.o", "ffn.inverted", "ffn.point"):
        weight = weights[f"blocks.0.{name}.weight"]
        assert weight.std() == pytest.approx((2 / sum(weight.shape)) ** 0.5, rel=0.03)
    assert weights["blocks.0.ffn.depthwise.conv.weight"].abs().max() == pytest.approx(1 / 3, rel=0.01)
    assert not weights["head.head.weight"].any()


def test_no_weight_decay_names_are_mixing_matrices_and_modulations() -> None:
    model = build(attention=["linear", "mhla"])
    names = {
        "blocks.0.modulation",
        "blocks.1.modulation",
        "head.modulation",
        "blocks.1.attn.attention.mixing.weight",
    }
    assert model.no_weight_decay() == names


def test_mixing_matrices_of_other_blocks_are_resampled() -> None:
    source = awake(build(attention={"name": "mhla", "blocks": 2}))
    target = build(attention={"name": "mhla", "blocks": (4, 4)})
    adapted = target.adapt_state_dict(source.state_dict())
    assert set(adapted.resampled) == {f"blocks.{i}.attn.attention.mixing.weight" for i in range(2)}
    assert adapted["blocks.0.attn.attention.mixing.weight"].shape == (16, 16)
