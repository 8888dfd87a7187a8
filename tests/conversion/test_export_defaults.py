"""A folder without a named format is that of the family's library, and opens there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mhla_lightning.backbones import build_backbone
from mhla_lightning.conversion.export import TrainedModel, plan_export, write
from mhla_lightning.conversion.hub import HubModel
from tests.helpers.errors import refused
from tests.helpers.wan_checkpoints import ALL_OPTIONS, CHANNELS, TEXT, opened

Opened = Callable[[Path], Callable[..., Tensor]]


def by_transformers(folder: Path) -> Callable[..., Tensor]:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    return lambda tokens: model(tokens).logits


def by_timm(folder: Path) -> Callable[..., Tensor]:
    import timm

    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def by_diffusers(folder: Path) -> Callable[..., Tensor]:
    model = opened(folder, strict=True)
    return lambda *inputs: model(*inputs).sample


def by_us(folder: Path) -> Callable[..., Tensor]:
    return HubModel.from_pretrained(folder)


TOKENS = torch.arange(16)[None] % 11
IMAGE = torch.linspace(-1, 1, 3 * 8 * 8).view(1, 3, 8, 8)
LATENT = torch.linspace(-1, 1, 4 * 8 * 8).view(1, 4, 8, 8)
CLIP = torch.linspace(-1, 1, CHANNELS * 4 * 4 * 6).view(1, CHANNELS, 4, 4, 6)
TIME, TEXTS = torch.tensor([7]), torch.linspace(-1, 1, 6 * TEXT).view(1, 6, TEXT)
SMALL: dict[str, Any] = {"embed_dim": 24, "depth": 2}
FAMILIES: dict[str, tuple[str, Any, dict[str, Any], Opened, tuple[Tensor, ...]]] = {
    "language": (
        "lm_tiny",
        "mhla",
        {"embed_dim": 32, "depth": 2, "vocab_size": 11, "context": 16},
        by_transformers,
        (TOKENS,),
    ),
    "classifier": (
        "deit_tiny",
        {"name": "mhla", "blocks": [2, 2]},
        {**SMALL, "num_heads": 2, "img_size": 8, "patch_size": 2, "num_classes": 3},
        by_timm,
        (IMAGE,),
    ),
    "image dit": (
        "dit_s2",
        {"name": "mhla", "blocks": [2, 2]},
        {**SMALL, "num_heads": 2, "input_size": 8, "num_classes": 3},
        by_us,
        (LATENT, TIME, torch.tensor([1])),
    ),
    "video": ("wan_1_3b", "softmax", ALL_OPTIONS, by_diffusers, (CLIP, TIME, TEXTS)),
}


def a_model(family: str) -> tuple[TrainedModel, torch.nn.Module]:
    backbone, attention, options, *_ = FAMILIES[family]
    torch.manual_seed(0)
    model = build_backbone(backbone, attention=attention, **options).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1).clamp_(-1, 1)
    return TrainedModel(model.state_dict(), backbone, attention, options, "a test's model"), model


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_folder_opens_in_the_library_of_the_family(family: str, tmp_path: Path) -> None:
    trained, ours = a_model(family)
    write(plan_export(trained), tmp_path / "out")
    *_, open_folder, inputs = FAMILIES[family]
    expected = ours(*inputs)
    torch.testing.assert_close(open_folder(tmp_path / "out")(*inputs), expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 1e-3


@pytest.mark.parametrize(
    ("family", "valid"), [("classifier", "timm, plain"), ("image dit", "plain"), ("language", "hf, plain")]
)
def test_another_familys_format_is_refused_with_those_that_fit(family: str, valid: str) -> None:
    with refused("format") as error:
        plan_export(a_model(family)[0], "wan")
    assert f"valid: {valid}, or leave it out" in str(error.value)


def test_one_file_has_our_own_names() -> None:
    export = plan_export(a_model("classifier")[0], one_file=True)
    assert export.opened_by is None, "the call that a folder names cannot open a file"
    assert export.metadata["backbone"] == "deit_tiny"
