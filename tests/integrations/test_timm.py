"""The image classifiers as models of timm: what its users do with any of its models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import save_for_hf

from mhla_lightning.attention import ATTENTION
from mhla_lightning.backbones import IMAGE_CLASSIFIERS
from tests.helpers.classifiers import TINY_VLT, tiny_options
from tests.helpers.errors import refused

NAMES = [f"{backbone}_{attention}" for backbone in IMAGE_CLASSIFIERS for attention in ATTENTION]
SMALL: dict[str, Any] = {"img_size": 64, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 10}
every_operator = pytest.mark.parametrize("name", [f"deit_tiny_{attention}" for attention in ATTENTION])


def create(name: str = "deit_tiny_mhla", **options: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model(name, **{**SMALL, **options}).eval()


def images(*size: int, channels: int = 3) -> torch.Tensor:
    return torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", NAMES)
def test_every_name_has_a_config(name: str) -> None:
    config = timm.get_pretrained_cfg(name)
    assert config is not None
    assert (config.architecture, config.input_size, config.num_classes) == (name, (3, 224, 224), 1000)
    model: Any = timm.create_model(name, **tiny_options(name))
    assert model.default_cfg is model.pretrained_cfg
    weights = dict(model.named_parameters())
    assert f"{model.default_cfg['classifier']}.weight" in weights
    assert f"{model.default_cfg['first_conv']}.weight" in weights
    with refused("pretrained"):
        timm.create_model(name, pretrained=True, **tiny_options(name))


@every_operator
@pytest.mark.parametrize(
    ("size", "shown"), [((64, 64), (4, 4)), ((48, 80), (4, 6)), ((96, 96), (6, 6))], ids=str
)
def test_intermediates_are_those_of_the_forward(
    name: str, size: tuple[int, int], shown: tuple[int, int]
) -> None:
    """Maps show the image, without tokens that hold padding only; lists of tokens are whole."""
    model, x = create(name, img_size=size, mask_padding=True), images(*size)
    final, tokens = model.forward_intermediates(x, output_fmt="NLC")
    torch.testing.assert_close(final, model.forward_features(x))
    torch.testing.assert_close(final, model.norm(tokens[2]))
    real = [found[:, model.token_mask] for found in tokens]
    maps = model.forward_intermediates(x, intermediates_only=True)
    for found, expected in zip(maps, real, strict=True):
        assert found.shape == (2, 16, *shown)
        torch.testing.assert_close(found.flatten(2).mT, expected)
    as_dict = model.forward_intermediates(x, indices=1, norm=True, output_dict=True)
    (last,) = as_dict["image_intermediates"]
    torch.testing.assert_close(last.flatten(2).mT, model.norm(real[2]))
    features = create(name, img_size=size, mask_padding=True, features_only=True, out_indices=(0, 2))
    assert features.feature_info.channels() == [16, 16]
    for found, expected in zip(features(x), (maps[0], maps[2]), strict=True):
        torch.testing.assert_close(found, expected)


@every_operator
def test_another_input_size(name: str) -> None:
    model = create(name).double()
    model.pos_embed.requires_grad_(False)
    before = model(images(64, 64).double())
    model.set_input_size(64)
    assert torch.equal(model(images(64, 64).double()), before)  # the same size changes nothing
    model.set_input_size(img_size=(96, 128))
    x = images(96, 128).double()
    assert model(x).shape == (2, 10)
    assert (model.img_size, model.grid) == ((96, 128), (8, 8))
    assert not model.pos_embed.requires_grad
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    fresh = create(name, img_size=(96, 128)).double()
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh(x), model(x))
    model.set_input_size(patch_size=8)
    assert model.grid == (12, 16)
    assert model(x).shape == (2, 10)
    with refused("img_size"):
        model.set_input_size(img_size=100)
    assert model(x).shape == (2, 10)


def test_blocks_of_a_size_are_resampled_and_padding_is_masked_anew() -> None:
    entry = {"name": "mhla", "block_size": 2}
    model = create(attention=entry, mask_padding=True)
    assert model.blocks[0].attn.attention.mixing.blocks == 4
    model.set_input_size((48, 80))
    assert model.blocks[0].attn.attention.mixing.blocks == 8
    fresh = create(attention=entry, mask_padding=True, img_size=(48, 80))
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh(images(48, 80)), model(images(48, 80)))


@every_operator
def test_heads_pools_and_channels(name: str) -> None:
    model, x = create(name, in_chans=1), images(64, 64, channels=1)
    tokens = model.forward_features(x)
    assert model.get_classifier() is model.head
    torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), model.fc_norm(tokens.mean(1)))
    model.reset_classifier(7)
    assert model(x).shape == (2, 7)
    model.reset_classifier(0, "max")
    torch.testing.assert_close(model(x), model.fc_norm(tokens.amax(1)))
    model.reset_classifier(0, "")
    assert model(x).shape == tokens.shape
    for pool in ("avg", "max", "avgmax", "map"):
        assert create(name, global_pool=pool)(images(64, 64)).shape == (2, 10)
    for wrong in ("token", "middle"):
        with refused("global_pool"):
            create(name, global_pool=wrong)
        with refused("global_pool"):
            model.reset_classifier(3, wrong)
    with refused("global_pool"):
        model.reset_classifier(3, "map")


def test_pooling_leaves_masked_padding_out() -> None:
    model, x = create(img_size=(48, 80), mask_padding=True), images(48, 80)
    real = model.forward_features(x)[:, model.token_mask]
    assert real.shape[1] < model.grid[0] * model.grid[1]
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), model.fc_norm(real.mean(1)))
    model.reset_classifier(0, "max")
    torch.testing.assert_close(model(x), model.fc_norm(real.amax(1)))


@every_operator
def test_a_saved_folder_is_loaded_back(name: str, tmp_path: Path) -> None:
    model = create(name)
    model.set_input_size((48, 80))
    model.reset_classifier(5, "max")
    x = images(48, 80)
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    assert torch.equal(timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(x), model(x))
    other = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=3, img_size=64)
    assert other(images(64, 64)).shape == (2, 3)


@pytest.mark.parametrize("attention", ATTENTION)
def test_a_saved_vlt_is_loaded_back(attention: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = timm.create_model(f"vlt_tiny_{attention}", **TINY_VLT)
    model(images(28, 28))  # moves the statistics of batch normalisation
    model.eval().set_input_size((48, 80))
    model.reset_classifier(5, "max")
    x = images(48, 80)
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    loaded: Any = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(loaded(x), model(x))
    other: Any = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=3, img_size=64)
    assert other(images(64, 64)).shape == (2, 3)
