"""Weights from files: of which model they are, which of several are taken, and what was done with them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from mhla_lightning.backbones import build_backbone, known_geometry
from mhla_lightning.checkpoints.average import open_average
from mhla_lightning.checkpoints.source import open_source
from mhla_lightning.tasks import ClassificationTask
from mhla_lightning.weights.target import file_header
from mhla_lightning.weights.warm_start import InitFrom, WarmStart, read_weights, start_from
from tests.helpers.errors import refused

ATTENTION = {"name": "mhla", "blocks": [2, 4]}
MIXING = "blocks.0.attn.attention.mixing.weight"


def options(grid: Sequence[int]) -> dict[str, Any]:
    sizes = {"img_size": [4 * grid[0], 4 * grid[1]], "patch_size": 4, "token_multiple": 1}
    return sizes | {"embed_dim": 8, "depth": 1, "num_heads": 2, "num_classes": 3}


def vit(grid: Sequence[int], attention: Any = ATTENTION) -> Any:
    return build_backbone("deit_tiny", attention=attention, **options(grid))


SOURCE = (4, 8)


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """Of 4 x 8 tokens, without the notes of torch."""
    torch.manual_seed(3)
    model = vit(SOURCE)
    with torch.no_grad():
        model.pos_embed.copy_(torch.randn(1, 32, 8))
        model.get_parameter(MIXING).copy_(torch.rand(8, 8))
    return {name: value.detach() for name, value in model.state_dict().items()}


def bare(folder: Path, state: dict[str, Tensor]) -> Path:
    save_file(state, folder / "bare.safetensors")
    return folder / "bare.safetensors"


def exported(folder: Path, state: dict[str, Tensor]) -> Path:
    header = file_header("deit_tiny", ATTENTION, options(SOURCE), "a run")
    save_file(state, folder / "one.safetensors", metadata=header)
    return folder / "one.safetensors"


def plain_folder(folder: Path, state: dict[str, Tensor]) -> Path:
    save_file(state, folder / "model.safetensors")
    facts = {"backbone": "deit_tiny", "attention": ATTENTION, "backbone_options": options(SOURCE)}
    (folder / "config.json").write_text(json.dumps(facts))
    return folder


def for_timm(folder: Path, state: dict[str, Tensor]) -> Path:
    save_file(state, folder / "model.safetensors")
    facts = {"architecture": "deit_tiny_mhla", "num_classes": 3}
    facts["model_args"] = {**options(SOURCE), "attention": ATTENTION}
    facts["pretrained_cfg"] = {"input_size": [3, 16, 32], "num_classes": 3, "first_conv": "patch_embed.proj"}
    (folder / "config.json").write_text(json.dumps(facts))
    return folder


def run(folder: Path, state: dict[str, Tensor], ema: bool = False) -> Path:
    place = folder / "checkpoints" / "step-00000004"
    place.mkdir(parents=True)
    model = {"backbone": "deit_tiny", "attention": ATTENTION, "backbone_options": options(SOURCE)}
    recipe = {"model": {"class_path": "mhla_lightning.tasks.ClassificationTask", "init_args": model}}
    (place / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (place / "COMPLETE").touch()
    raw = {f"backbone.{name}": value * (0.5 if ema else 1) for name, value in state.items()}
    torch.save({"state_dict": raw, "optimizer_states": [{"state": {}}]}, place / "trainer.ckpt")
    if ema:
        (place / "ema").mkdir()
        save_file(state, place / "ema" / "weights.safetensors")
    return folder


DOORS: dict[str, Callable[[Path, dict[str, Tensor]], Path]] = {
    "export": exported,
    "folder": plain_folder,
    "timm": for_timm,
    "run": run,
    "average": lambda folder, state: run(folder, state, ema=True),
}


def resampled(state: dict[str, Tensor], grid: Sequence[int]) -> Tensor:
    image = state["pos_embed"].view(1, *SOURCE, 8).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=tuple(grid), mode="bicubic", antialias=True)
    return image.permute(0, 2, 3, 1).reshape(1, -1, 8)


def started(model: Any, source: str | InitFrom) -> WarmStart:
    return start_from(model, source, "init_from", known_geometry)


@pytest.mark.parametrize("grid", [(8, 8), (2, 16)], ids=str)
@pytest.mark.parametrize("door", DOORS)
def test_files_that_name_their_model_are_resampled_from_its_grid(
    tmp_path: Path, state: dict[str, Tensor], door: str, grid: tuple[int, int]
) -> None:
    model = vit(grid, {"name": "mhla", "blocks": [2, 2]})
    report = started(model, str(DOORS[door](tmp_path, state)))
    torch.testing.assert_close(model.pos_embed.detach(), resampled(state, grid))
    halves = torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]])
    pairs = torch.block_diag(halves, halves)
    torch.testing.assert_close(model.get_parameter(MIXING).detach(), pairs @ state[MIXING] @ pairs.T)
    assert set(report.resampled) == {"pos_embed", MIXING}
    assert len(report.copied) == len(state) - 2
    assert (report.fresh, report.left) == ([], [])
    assert f"4 x 8 to {grid[0]} x {grid[1]} tokens" in str(report)
    assert f"{len(state) - 2} tensors copied; 2 resampled" in str(report)


@pytest.mark.parametrize("grid", [(8, 8), (2, 16)], ids=str)
def test_positions_of_an_unknown_grid_are_new_until_it_is_told(
    tmp_path: Path, state: dict[str, Tensor], grid: tuple[int, int]
) -> None:
    path = str(bare(tmp_path, state))
    model = vit(grid)
    before = model.pos_embed.detach().clone()
    report = started(model, path)
    assert torch.equal(model.pos_embed, before)
    assert report.fresh == ["pos_embed"]
    assert len(report.copied) == len(state) - 1
    assert "grid" in report.left[0]
    report = started(model, InitFrom(path, grid=[4, 8]))
    torch.testing.assert_close(model.pos_embed.detach(), resampled(state, grid))
    assert report.fresh == []
    with refused("init_from.grid"):
        started(model, InitFrom(path, grid=[3, 3]))


def test_the_name_of_a_model_of_timm_tells_its_grid(tmp_path: Path) -> None:
    """A file of its weights by the public name, and a folder of the hub."""
    theirs = timm.create_model("deit_tiny_patch16_224", embed_dim=24, depth=1, num_heads=3)
    torch.save({"model": theirs.state_dict()}, tmp_path / "deit_tiny_patch16_224-a1311bcf.pth")
    hub = timm.models.VisionTransformer(img_size=(16, 32), patch_size=4, embed_dim=24, depth=1, num_heads=3)
    (tmp_path / "hub").mkdir()
    save_file(hub.state_dict(), tmp_path / "hub" / "model.safetensors")
    facts = {"architecture": "vit_of_ours", "pretrained_cfg": {"input_size": [3, 16, 32]}}
    (tmp_path / "hub" / "config.json").write_text(json.dumps(facts))
    for path, patch, change in (
        (tmp_path / "deit_tiny_patch16_224-a1311bcf.pth", 16, "14 x 14 to 2 x 3 tokens"),
        (tmp_path / "hub", 4, "4 x 8 to 2 x 3 tokens"),
    ):
        sizes = {"img_size": [2 * patch, 3 * patch], "patch_size": patch, "token_multiple": 1}
        small: dict[str, Any] = {"embed_dim": 24, "depth": 1, "num_heads": 3}
        report = started(build_backbone("deit_tiny", attention="softmax", **sizes, **small), str(path))
        assert report.resampled == {"pos_embed": change}
        assert "cls_token" in report.left


def test_a_model_of_timm_takes_a_folder_of_another_size(tmp_path: Path, state: dict[str, Tensor]) -> None:
    folder = for_timm(tmp_path, state)
    model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True, img_size=[8, 64])
    torch.testing.assert_close(model.pos_embed.detach(), resampled(state, (2, 16)))


def test_a_checkpoint_with_an_average_says_which_weights_are_taken(
    tmp_path: Path, state: dict[str, Tensor]
) -> None:
    raw = {name: value * 2 for name, value in state.items()}
    moments = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []}
    for average in ("model_ema", "state_dict_ema", "ema"):
        path = tmp_path / f"{average}.pth"
        torch.save({"model": raw, average: state, "optimizer": moments, "epoch": 3}, path)
        _, found = read_weights(str(path))
        assert torch.equal(found["head.weight"], state["head.weight"])
        assert f"'{average}'" in found.taken
        assert "'model'" in found.taken
        assert "optimizer" not in found.taken
        _, found = read_weights(InitFrom(str(path), weights="model"))
        assert torch.equal(found["head.weight"], raw["head.weight"])
    with refused("init_from.weights"):
        read_weights(InitFrom(str(path), weights="optimizer"))
    torch.save({"student": raw, "teacher": state}, tmp_path / "dino.pth")
    with refused("init_from") as error:
        read_weights(str(tmp_path / "dino.pth"))
    assert "student, teacher" in str(error.value)
    _, found = read_weights(InitFrom(str(tmp_path / "dino.pth"), weights="teacher"))
    assert torch.equal(found["head.weight"], state["head.weight"])


def test_a_run_with_an_average_says_that_it_is_taken(tmp_path: Path, state: dict[str, Tensor]) -> None:
    folder = str(run(tmp_path, state, ema=True))
    model = vit(SOURCE)
    assert "averaged" in str(started(model, folder))
    assert torch.equal(model.head.weight, state["head.weight"])
    started(model, InitFrom(folder, weights="raw"))
    assert torch.equal(model.head.weight, state["head.weight"] / 2)
    with refused("init_from.weights"):
        started(model, InitFrom(folder, weights="best"))


def test_wrappers_inside_a_name_are_removed(tmp_path: Path, state: dict[str, Tensor]) -> None:
    names = {name: name.replace("blocks.0.", "blocks.0._orig_mod.") for name in state}
    torch.save({f"module._orig_mod.{names[name]}": value for name, value in state.items()}, tmp_path / "x.pt")
    report = started(vit(SOURCE), InitFrom(str(tmp_path / "x.pt"), grid=[4, 8]))
    assert (len(report.copied), report.fresh, report.left) == (len(state), [], [])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("door", [bare, exported, run])
def test_weights_that_are_no_numbers_stop_a_start(
    tmp_path: Path, state: dict[str, Tensor], door: Callable[..., Path], value: float
) -> None:
    state = {name: tensor.clone() for name, tensor in state.items()}
    state["blocks.0.mlp.fc2.bias"][1] = value
    task = ClassificationTask(
        "deit_tiny", ATTENTION, options(SOURCE), num_classes=3, init_from=str(door(tmp_path, state))
    )
    with refused("init_from") as error:
        task.configure_model()
    assert "blocks.0.mlp.fc2.bias" in str(error.value)


def test_numbers_beyond_half_precision_are_refused(tmp_path: Path, state: dict[str, Tensor]) -> None:
    wide = {**state, "head.bias": torch.full((3,), 1e5)}
    with refused("init_from") as error:
        started(vit(SOURCE).half(), str(bare(tmp_path, wide)))
    assert "head.bias" in str(error.value)
    started(vit(SOURCE), str(bare(tmp_path, wide)))


def test_a_checkpoint_of_numbers_that_are_none_is_not_resumed(
    tmp_path: Path, state: dict[str, Tensor]
) -> None:
    groups = [{"names": ["backbone.head.bias"]}]
    for name, moment, found in (
        ("head.bias", 0.0, "backbone.head.bias holds NaN"),
        ("none", float("nan"), "exp_avg of backbone.head.bias holds NaN"),
        ("none", 0.0, ""),
    ):
        weights = {f"backbone.{key}": value.clone() for key, value in state.items()}
        if name != "none":
            weights[f"backbone.{name}"][0] = float("nan")
        moments = {"state": {0: {"exp_avg": torch.full((3,), moment)}}}
        content = {"state_dict": weights, "optimizer_states": [moments], "optimizer_groups": groups}
        torch.save(content, tmp_path / "trainer.ckpt")
        source = open_source(tmp_path / "trainer.ckpt")
        if not found:
            source.check()
            continue
        with refused(str(tmp_path / "trainer.ckpt")) as error:
            source.check()
        assert found in str(error.value)
    (tmp_path / "ema").mkdir()
    save_file({"a": torch.tensor([1.0, float("nan")])}, tmp_path / "ema" / "weights.safetensors")
    reader = open_average(tmp_path, {"a": torch.zeros(2)})
    assert reader is not None
    with refused(str(tmp_path / "ema")):
        reader("a", 0, 2)


def test_a_recipe_may_say_more_of_its_weights(
    tmp_path: Path, state: dict[str, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "both.pth"
    torch.save({"model": state, "model_ema": {name: 2 * value for name, value in state.items()}}, path)
    given: dict[str, Any] = {"path": str(path), "weights": "model", "grid": [4, 8]}
    task = ClassificationTask(
        "deit_tiny", ATTENTION, options((2, 16)), num_classes=3, init_from=InitFrom(**given)
    )
    with caplog.at_level(logging.INFO):
        task.configure_model()
    assert task.backbone is not None
    assert torch.equal(task.backbone.get_parameter("head.weight"), state["head.weight"])
    assert "'model', not 'model_ema'" in caplog.text
