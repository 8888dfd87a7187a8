"""`mhla import timm`: ViTs and DeiTs of timm, with every tensor accounted for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.layers.activations import QuickGELU
from torch import nn

from mhla_lightning.backbones import build_backbone
from mhla_lightning.cli.main import main
from mhla_lightning.conversion.foreign import Imported
from mhla_lightning.conversion.timm_models import open_timm
from mhla_lightning.conversion.timm_vit import convert_timm
from mhla_lightning.tasks import ClassificationTask
from mhla_lightning.weights.facts import facts_of
from mhla_lightning.weights.target import ImportTarget, Wish
from mhla_lightning.weights.warm_start import start_from
from tests.helpers.errors import refused

SMALL: dict[str, Any] = {"depth": 2, "num_classes": 5, "embed_dim": 24, "num_heads": 3, "img_size": 64}
MODELS: dict[str, dict[str, Any]] = {
    "deit": {"name": "deit_tiny_patch16_224"},
    "deit3, whose branches are scaled": {"name": "deit3_small_patch16_224"},
    "without a class token": {
        "name": "vit_tiny_patch16_224",
        "class_token": False,
        "global_pool": "avg",
        "fc_norm": False,
    },
    "averaged": {"name": "vit_tiny_patch16_224", "global_pool": "avg"},
    "without biases": {"name": "vit_tiny_patch16_224", "qkv_bias": False},
}


def write_model(
    folder: Path, name: str, model_args: dict[str, Any] | None = None, **options: Any
) -> nn.Module:
    """A folder of timm with random weights; returns timm's model."""
    torch.manual_seed(0)
    arguments = {**SMALL, **options}
    model = timm.create_model(name, pretrained=False, **arguments).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn_like(value) * 0.1)
    folder.mkdir()
    save_file(
        {key: value.contiguous() for key, value in model.state_dict().items()}, folder / "model.safetensors"
    )
    config = {"architecture": name, "model_args": arguments if model_args is None else model_args}
    (folder / "config.json").write_text(json.dumps(config))
    return model


def imported(path: Path, attention: Any = None, **wish: Any) -> tuple[nn.Module, Imported, ImportTarget]:
    found, target = convert_timm(open_timm(str(path)), Wish(str(path), attention=attention, **wish))
    model = build_backbone(target.backbone, attention=target.attention, **target.options).eval()
    model.load_state_dict(found.weights)
    return model, found, target


@pytest.mark.parametrize("case", MODELS)
def test_softmax_has_timms_logits(case: str, tmp_path: Path) -> None:
    theirs = write_model(tmp_path / "m", **MODELS[case])
    ours, found, _ = imported(tmp_path / "m")
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        wanted = theirs(images)
        assert (ours(images) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert not found.left
    assert not found.created


@pytest.mark.parametrize("attention", ["linear", "mhla", ["softmax", "mhla"]], ids=str)
def test_another_attention_starts_from_every_tensor(attention: Any, tmp_path: Path) -> None:
    theirs = write_model(tmp_path / "m", **MODELS["deit"])
    ours, found, target = imported(tmp_path / "m", attention)
    names = {name for name, _ in [*found.copied, *found.resampled, *found.left]}
    assert names == set(theirs.state_dict())
    keeps_class = attention == "linear"
    assert [name for name, _ in found.left] == ([] if keeps_class else ["cls_token"])
    assert any("class token is left over" in note for note in found.notes) is not keeps_class
    for name, value in theirs.state_dict().items():
        if name == "pos_embed":
            value = value if keeps_class else value[:, 1:]
        if name in found.weights:
            torch.testing.assert_close(found.weights[name], value, rtol=0, atol=0)
    assert all(".attn." in name for name, _ in found.created)
    assert ours(torch.randn(1, 3, 64, 64)).isfinite().all()


def test_a_bare_file_is_known_by_its_shapes_or_told_by_name(tmp_path: Path) -> None:
    theirs = write_model(tmp_path / "m", "vit_tiny_patch16_224", embed_dim=128, num_heads=2)
    torch.save({"model": theirs.state_dict()}, tmp_path / "weights.pth")
    opened = open_timm(str(tmp_path / "weights.pth"))
    assert "2 heads" in opened.notes[0]
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(opened.model(images), theirs(images))
    with refused("path") as error:
        open_timm(str(tmp_path / "weights.pth"), named="deit_tiny_patch16_224")
    assert "192" in error.value.reason


def test_the_head_of_other_classes_is_replaced_with_a_sentence(tmp_path: Path) -> None:
    write_model(tmp_path / "m", **MODELS["deit"])
    out = tmp_path / "deit.safetensors"
    assert main(["import", "timm", str(tmp_path / "m"), "--out", str(out), "--attention", "mhla"]) == 0
    facts = facts_of(out)
    assert facts.mean == (0.485, 0.456, 0.406)
    options = {key: value for key, value in facts.options.items() if key != "num_classes"}
    task = ClassificationTask("deit_tiny", facts.attention, options, num_classes=3, init_from=str(out))
    assert task.start_normalisation() == (facts.mean, facts.std)
    task.configure_model()
    assert task.backbone is not None
    report = start_from(task.backbone, str(out), "init_from")
    assert "its head of 5 classes is replaced by a new one of 3" in str(report)
    assert sorted(report.fresh) == ["head.bias", "head.weight"]
    weights = load_file(out)
    for name in report.copied:
        torch.testing.assert_close(task.backbone.state_dict()[name], weights[name], rtol=0, atol=0)


def test_the_command_prints_what_trains_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(tmp_path / "m", **MODELS["deit"])
    out = tmp_path / "deit.safetensors"
    assert main(["import", "timm", str(tmp_path / "m"), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "0 new in ours, 0 left over" in said
    assert f"--model.init_from {out}" in said
    with safe_open(out, "pt") as opened:
        assert json.loads(opened.metadata()["pixels"])["std"] == [0.229, 0.224, 0.225]


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("deit_tiny_distilled_patch16_224", "distillation token"),
        ("vit_medium_patch16_reg4_gap_256", "register tokens"),
        ("vit_base_patch16_clip_224", "a norm before its blocks"),
    ],
)
def test_models_with_other_parts_are_refused(name: str, word: str, tmp_path: Path) -> None:
    write_model(tmp_path / "m", name)
    with refused("path") as error:
        open_timm(str(tmp_path / "m"))
    assert word in error.value.reason


def test_an_activation_that_no_tensor_shows_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "m", **MODELS["deit"])
    opened = open_timm(str(tmp_path / "m"))
    for block in opened.model.blocks:
        block.mlp.act = QuickGELU()  # type: ignore[union-attr]
    with refused("path") as error:
        convert_timm(opened, Wish("m"))
    assert "activation" in error.value.reason


def test_a_config_that_names_files_or_other_models_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "m", "deit_tiny_patch16_224", {**SMALL, "checkpoint_path": "/etc/passwd"})
    with refused("path") as error:
        open_timm(str(tmp_path / "m"))
    assert "checkpoint_path" in error.value.reason
    for name in ("resnet18", "hf-hub:someone/model"):
        (tmp_path / "m" / "config.json").write_text(json.dumps({"architecture": name}))
        with refused("path"):
            open_timm(str(tmp_path / "m"))


def test_a_name_that_is_neither_here_nor_timms_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", "timm", "deit_tiny_patch16_22", "--out", "x.safetensors"]) == 2
    said = capsys.readouterr().err
    assert "no file and no folder here" in said
    assert "deit_tiny_patch16_224" in said
    with refused("backbone"):
        convert_timm(None, Wish("m", backbone="dit_s2"))  # type: ignore[arg-type]  # refused before it is read
