"""Backbones on the Hugging Face Hub, for which a local folder stands."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.hub_mixin
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mhla_lightning.backbones import build_backbone
from mhla_lightning.cli.main import main
from mhla_lightning.conversion import hub
from mhla_lightning.conversion.formats.card import Record
from mhla_lightning.conversion.hub import HubModel
from tests.helpers.errors import refused

VIT = {"img_size": 32, "patch_size": 8, "num_classes": 3, "depth": 1, "embed_dim": 24, "num_heads": 2}
DIT = {"input_size": 8, "in_channels": 4, "depth": 1, "embed_dim": 32, "num_heads": 2, "num_classes": 3}
WAN = {"input_size": [2, 8, 8], "patch_size": [1, 2, 2], "blocks": [1, 2, 2], "embed_dim": 32, "ffn_dim": 32}
VLT = {"img_size": [28, 36], "embed_dims": [8, 8, 12, 12], "depths": [2, 1, 1, 1], "num_heads": [1, 1, 1, 3]}
MODELS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "stages": ("vlt_tiny", [["mhla", "linear"], "mhla", "softmax", "softmax"], {**VLT, "num_classes": 3}),
    "classifier": ("deit_tiny", {"name": "mhla", "blocks": 4}, VIT),
    "image": ("dit_s2", ["mhla", "softmax"], DIT),
    "video": ("wan_tiny", "mhla", {**WAN, "depth": 1, "num_heads": 2}),
}
RECORD = Record("tiny", "`ImageDataModule` of `mnist`", {"val/top1": 0.5}, "mhla run tiny", "mit")


def built(kind: str) -> nn.Module:
    torch.manual_seed(0)
    name, attention, options = MODELS[kind]
    model = build_backbone(name, attention=attention, **options)
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.1)
    return model


@pytest.fixture
def classifier() -> HubModel:
    return HubModel(built("classifier"), *MODELS["classifier"], RECORD)


@pytest.mark.parametrize("kind", MODELS)
def test_a_folder_gives_the_same_model_back(kind: str, tmp_path: Path) -> None:
    model = HubModel(built(kind), *MODELS[kind], RECORD)
    model.save_pretrained(tmp_path / "m")
    assert {file.name for file in (tmp_path / "m").iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
    }
    opened = HubModel.from_pretrained(tmp_path / "m")
    assert type(opened.model) is type(model.model)
    assert not opened.training
    state = model.model.state_dict()
    assert opened.model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in opened.model.state_dict().items())
    opened.save_pretrained(tmp_path / "again")
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("m", "again")]
    assert all(torch.equal(value, files[1][name]) for name, value in files[0].items())


def test_the_card_names_recipe_data_numbers_and_licence(classifier: HubModel, tmp_path: Path) -> None:
    classifier.save_pretrained(tmp_path / "m")
    card = (tmp_path / "m" / "README.md").read_text()
    for part in ("`tiny`", "`ImageDataModule` of `mnist`", "| val/top1 | 0.5 |", "mhla run tiny", "| mit |"):
        assert part in card
    assert 'license: "mit"' in card
    assert 'pipeline_tag: "image-classification"' in card
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(HubModel.from_pretrained(tmp_path / "m")(x), classifier.eval()(x))


def test_pushed_and_opened_by_name(
    classifier: HubModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Folder:
        """A folder in the place of the Hub."""

        def __init__(self, **_: Any) -> None: ...

        def create_repo(self, repo_id: str, **_: Any) -> Any:
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, *, repo_id: str, folder_path: str, **_: Any) -> str:
            shutil.copytree(folder_path, tmp_path / repo_id)
            return repo_id

    monkeypatch.setattr(huggingface_hub.hub_mixin, "HfApi", Folder)
    monkeypatch.setattr(hub, "snapshot_download", lambda name, **_: str(tmp_path / name))
    monkeypatch.chdir(tmp_path.parent)
    assert classifier.push_to_hub("someone/model") == "someone/model"
    assert HubModel.from_pretrained("someone/model").described.backbone == "deit_tiny"


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"backbone": None}, None),
        ({"attention": {"class_path": "os.system"}}, "attention.class_path"),
        (
            {"backbone_options": {**VIT, "act": {"class_path": "subprocess.Popen"}}},
            "backbone_options.act.class_path",
        ),
        ({"backbone_options": {**VIT, "depth": 2}}, None),
        ({"backbone_options": {**VIT, "other": 2}}, "other"),
    ],
)
def test_a_strangers_config_is_checked(
    change: dict[str, Any], key: str | None, classifier: HubModel, tmp_path: Path
) -> None:
    folder = tmp_path / "m"
    classifier.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    source = str(folder) if "backbone" in change else "a built model"
    with refused(source if key is None else key):
        HubModel.from_pretrained(folder)


def test_only_safetensors_with_finite_numbers_are_read(classifier: HubModel, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    classifier.save_pretrained(folder)
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights["head.weight"][0, 0] = torch.nan
    save_file(weights, file)
    with refused("a built model"):
        HubModel.from_pretrained(folder)
    file.unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with refused(str(folder)):
        HubModel.from_pretrained(folder)


def test_what_the_mixin_offers_and_we_do_not_is_refused(classifier: HubModel, tmp_path: Path) -> None:
    with refused("config"):
        classifier.save_pretrained(tmp_path / "m", config={})  # type: ignore[arg-type]
    classifier.save_pretrained(tmp_path / "m")
    with refused("to"):
        classifier.save_pretrained(tmp_path / "m")
    with refused("a built model"):
        HubModel(built("classifier"), "deit_tiny", "softmax", VIT)
    with refused("model"):
        HubModel(build_backbone("lm_tiny", depth=1, embed_dim=32, vocab_size=9), "lm_tiny")


def test_mhla_export_reads_a_folder_of_the_hub(classifier: HubModel, tmp_path: Path) -> None:
    classifier.save_pretrained(tmp_path / "m")
    assert main(["export", str(tmp_path / "m"), "--to", str(tmp_path / "timm"), "--format", "timm"]) == 0
    assert json.loads((tmp_path / "timm" / "config.json").read_text())["architecture"] == "deit_tiny_mhla"
