"""Vision backbones, over every entry of the registry and of the timm names."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from mhla_lightning import backbones
from mhla_lightning.attention import ATTENTION, MHLA, Softmax
from mhla_lightning.backbones import (
    IMAGE_CLASSIFIERS,
    VisionTransformer,
    ViTOptions,
    default_options,
    register_backbone,
)
from mhla_lightning.backbones.vit import padded_grid
from tests.helpers.classifiers import TINY_VIT, tiny_options
from tests.helpers.errors import refused
from tests.helpers.marks import every_nth

TINY = TINY_VIT


def build_backbone(name: str, **options: Any) -> Any:
    """Untyped on purpose: the tests look inside."""
    return backbones.build_backbone(name, **options)


@pytest.mark.parametrize(
    ("name", "parameters"), [("deit_tiny", 5_793_832), ("deit_small", 22_200_424), ("deit_base", 86_864_104)]
)
def test_preset_release_has_the_released_parameter_counts(name: str, parameters: int) -> None:
    """SPEC 3.1."""
    with torch.device("meta"):
        model = build_backbone(name, attention={"name": "mhla", "preset": "release"})
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize(("name", "attention"), list(product(IMAGE_CLASSIFIERS, ATTENTION)))
def test_timm_creates_every_backbone_with_every_operator(name: str, attention: str) -> None:
    options = tiny_options(name)
    model: Any = timm.create_model(f"{name}_{attention}", **options)
    side = options["img_size"]
    assert model(torch.randn(2, 3, side, side)).shape == (2, 5)
    blocks = model.stages[0].blocks if name.startswith("vlt_") else model.blocks
    assert {type(block.attn.attention) for block in blocks} == {ATTENTION[attention]}


@pytest.mark.parametrize("attention", [*ATTENTION, {"name": "mhla", "preset": "release"}], ids=str)
@pytest.mark.parametrize(
    ("img_size", "grid"),
    every_nth(
        [(224, (16, 16)), (256, (16, 16)), (384, (24, 24)), (512, (32, 32)), ((224, 336), (16, 24))],
        4,
        several=True,
    ),
    ids=str,
)
def test_flops_and_grid_at_the_papers_sizes(
    attention: str | dict, img_size: int | tuple[int, int], grid: tuple[int, int]
) -> None:
    with torch.device("meta"):
        model = build_backbone("deit_tiny", attention=attention, img_size=img_size).eval()
        sides = (img_size, img_size) if isinstance(img_size, int) else img_size
        image = torch.empty(1, 3, *sides)
    assert model.grid == grid
    with FlopCounterMode(display=False) as counter:
        assert model(image).shape == (1, 1000)
    assert counter.get_total_flops() == model.flops(model.grid)


def test_a_list_of_operators_is_cycled_over_the_layers() -> None:
    model = build_backbone(
        "deit_tiny", attention=["softmax", "mhla", {"name": "mhla", "blocks": 2}], **{**TINY, "depth": 6}
    )
    operators = [block.attn.attention for block in model.blocks]
    assert [type(o) for o in operators] == [Softmax, MHLA, MHLA] * 2
    assert [o.grid.num_blocks for o in operators if isinstance(o, MHLA)] == [16, 4] * 2


@pytest.mark.parametrize("pos_conv", ["none", "lepe3", "lepe5", "cpe3"])
def test_positional_convolutions(pos_conv: str) -> None:
    torch.manual_seed(0)
    model = build_backbone("deit_tiny", attention={"name": "mhla", "pos_conv": pos_conv}, **TINY)
    kernels = {tuple(m.weight.shape[-2:]) for m in model.blocks.modules() if isinstance(m, torch.nn.Conv2d)}
    assert kernels == {"none": set(), "lepe3": {(3, 3)}, "lepe5": {(5, 5)}, "cpe3": {(3, 3)}}[pos_conv]
    image = torch.randn(2, 3, 32, 32)
    if pos_conv == "cpe3":  # zero at the start: a fresh one changes nothing
        torch.manual_seed(0)
        plain = build_backbone("deit_tiny", attention={"name": "mhla", "pos_conv": "none"}, **TINY)
        plain.load_state_dict(model.state_dict(), strict=False)
        torch.testing.assert_close(model(image), plain(image))


def test_tokens_stay_in_raster_order() -> None:
    """Moving the image by whole patches moves the tokens of a position-free model alike, whatever the
    blocks: nothing leaks block order.
    """
    model = build_backbone(
        "deit_tiny", attention={"name": "mhla", "blocks": 1, "pos_conv": "none"}, **TINY
    ).eval()
    torch.nn.init.zeros_(model.pos_embed)
    image = torch.randn(1, 3, 32, 32)
    tokens = model.forward_features(image).unflatten(1, model.grid)
    moved = model.forward_features(image.roll((8, 4), (2, 3))).unflatten(1, model.grid)
    torch.testing.assert_close(moved, tokens.roll((2, 1), (1, 2)), rtol=1e-4, atol=1e-5)


def test_masked_padding_is_never_seen() -> None:
    """With mask_padding, what stands in the padding ring cannot matter; without, it does (the paper lets
    it take part).
    """
    for masked in (True, False):
        torch.manual_seed(0)
        model = build_backbone(
            "deit_tiny", attention="mhla", **{**TINY, "img_size": 24}, mask_padding=masked
        ).eval()
        image = torch.randn(1, 3, 24, 24)
        framed = torch.nn.functional.pad(image, (4, 4, 4, 4), value=3.0)
        assert torch.allclose(model(image), model(framed), atol=1e-5) == masked


def test_padding_is_symmetric_and_only_when_needed() -> None:
    assert padded_grid((224, 224), 16, 4) == (16, 16)
    assert padded_grid((28, 28), 4, 4) == (8, 8)
    assert padded_grid((384, 224), 16, 4) == (24, 16)
    assert padded_grid((224, 224), 16, 1) == (14, 14)


def test_no_weight_decay_names_exist() -> None:
    model = build_backbone("deit_tiny", attention=["softmax", "mhla"], **TINY)
    names = dict(model.named_parameters())
    assert model.no_weight_decay() == {"pos_embed", "blocks.1.attn.attention.mixing.weight"}
    assert model.no_weight_decay() <= names.keys()


def test_weights_of_a_plain_timm_vit_fit_a_softmax_backbone() -> None:
    """Same numbers as timm's own model: class token aside, our softmax backbone is timm's ViT."""
    options = dict(TINY)
    theirs = timm.models.VisionTransformer(**options, class_token=False, global_pool="avg").eval()
    ours = VisionTransformer("softmax", ViTOptions(token_multiple=1, **options)).eval()
    ours.load_state_dict(ours.adapt_state_dict(theirs.state_dict(), grid=ours.grid))
    image = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours(image), theirs(image))


def test_position_embeddings_are_resampled_and_class_tokens_dropped() -> None:
    small: Any = timm.models.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3, num_classes=5
    )
    ours = build_backbone("deit_tiny", attention="softmax", **TINY)
    adapted = ours.adapt_state_dict(small.state_dict(), grid=(4, 4))
    assert adapted["pos_embed"].shape == ours.pos_embed.shape
    corner = small.pos_embed[:, 1:].mean(1)
    torch.testing.assert_close(adapted["pos_embed"].mean(1), corner, rtol=0.2, atol=2e-3)


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = build_backbone("deit_tiny", attention="mhla", **TINY)
        model.set_grad_checkpointing(checkpointing)
        model(torch.ones(2, 3, 32, 32)).sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize(
    ("name", "options", "key"),
    [
        ("deit_tinny", {}, "name"),
        ("deit_tiny", {"image_size": 32}, "image_size"),
        ("deit_tiny", {"img_size": 30, "patch_size": 4}, "img_size"),
        ("deit_tiny", {"attention": {"name": "mhla", "blocks": 5}}, "attention.blocks"),
        ("deit_tiny", {"attention": "mlha"}, "attention.name"),
        ("deit_tiny", {"attention": {"name": "mhla", "preset": "papr"}}, "attention.preset"),
        ("deit_tiny", {"attention": {"name": "mhla", "pos_conv": "lepe7"}}, "attention.pos_conv"),
        ("deit_tiny", {"attention": []}, "attention.name"),
        ("deit_tiny", {"embed_dim": 100}, "num_heads"),
    ],
    ids=str,
)
def test_wrong_options_are_one_clear_sentence(name: str, options: dict, key: str) -> None:
    with refused(key) as error:
        build_backbone(name, **options)
    assert "\n" not in str(error.value)


def test_unknown_names_come_with_the_nearest_one() -> None:
    with refused("name") as error:
        build_backbone("deit_tinny")
    assert "did you mean 'deit_tiny'" in str(error.value)
    with refused("image_size") as error:
        build_backbone("deit_tiny", image_size=32)
    assert "did you mean 'img_size'" in str(error.value)


def test_a_plain_function_can_be_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A third party's builder takes its options as keywords; unknown ones are refused for it."""
    monkeypatch.setattr("mhla_lightning.backbones.BACKBONES", {})

    def builder(attention: Any, width: int = 4) -> torch.nn.Module:
        return torch.nn.Linear(width, 1)

    register_backbone("other", builder)
    assert default_options("other") == {"width": 4}
    assert build_backbone("other", width=7).in_features == 7
    with refused("widht"):
        build_backbone("other", widht=7)


def test_images_of_another_size_are_refused() -> None:
    model = build_backbone("deit_tiny", attention="mhla", **TINY)
    with refused("x"):
        model(torch.randn(1, 3, 28, 32))
    with refused("name"):
        register_backbone("deit_tiny", VisionTransformer)
