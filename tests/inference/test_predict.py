"""`mhla predict`, and the classes of own images from the folder to the export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import pytest
import timm
import torch
from PIL import Image
from transformers import AutoConfig

import mhla_lightning as mhla
from mhla_lightning.cli.main import main
from mhla_lightning.config.recipes import read_run_recipe
from mhla_lightning.config.resolve import differences, resolve
from mhla_lightning.data import ImageDataModule, ReadingConfig
from mhla_lightning.data.index import read_index
from mhla_lightning.data.stores import open_store
from mhla_lightning.inference.classifier import find_classifier
from mhla_lightning.runs.classes import kept_classes
from mhla_lightning.runs.folder import RunFolder
from mhla_lightning.tasks import ClassificationTask
from tests.helpers.errors import refused
from tests.helpers.images import TINY_RECIPE, write_images

NAMES = ["class0", "class1", "class2", "class3"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images, a recipe whose `num_classes` is auto, and its run `tiny` of two steps."""
    root = tmp_path_factory.mktemp("own")
    shards = write_images(root)
    text = TINY_RECIPE.replace("PATH", str(shards)).replace("num_classes: 4", "num_classes: auto")
    (root / "tiny.yaml").write_text(text)
    short = {"trainer.max_steps": 2, "trainer.val_check_interval": 2, "model.schedule.warmup_steps": 1}
    mhla.run(root / "tiny.yaml", short, runs=root / "runs", run_id="tiny")
    return root


def test_auto_is_resolved_in_the_run_and_its_checkpoint(root: Path) -> None:
    run = RunFolder(root / "runs" / "tiny")
    values = read_run_recipe(run)
    assert values["model"]["init_args"]["num_classes"] == 4
    (checkpoint,) = run.checkpoints.iterdir()
    saved = torch.load(checkpoint / "trainer.ckpt", weights_only=True)
    assert saved["hyper_parameters"]["num_classes"] == 4
    given = {**values, "model": {**values["model"], "init_args": {**values["model"]["init_args"]}}}
    given["model"]["init_args"]["num_classes"] = "auto"
    assert not differences(values, given)
    given["model"]["init_args"]["num_classes"] = 5
    assert "num_classes" in differences(values, given)


def test_classes_are_kept_and_exported(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    assert find_classifier("tiny").classes == tuple(NAMES)
    assert main(["export", "tiny", "--to", "vit", "--format", "timm"]) == 0
    config = json.loads((root / "vit" / "config.json").read_text())
    assert config["label_names"] == NAMES
    assert (
        cast(Any, timm.create_model("local-dir:vit", pretrained=True)).pretrained_cfg["label_names"] == NAMES
    )
    assert AutoConfig.from_pretrained("vit").id2label == dict(enumerate(NAMES))


@pytest.mark.parametrize("text", ["", '{"format": 1, "classes": ["one"]}'])
def test_damaged_names_are_told(tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "classes.json").write_text(text)
    assert kept_classes(tmp_path, 3) == ("0", "1", "2")
    assert str(tmp_path / "classes.json") in caplog.text
    caplog.clear()
    (tmp_path / "classes.json").unlink()
    assert kept_classes(tmp_path, 3) == ("0", "1", "2")
    assert not caplog.text


def test_predictions_are_those_of_validation(root: Path) -> None:
    """Files in the order of val/ give what the validation loader gives."""
    split = mhla_split(root)
    found = find_classifier("tiny", runs=str(root / "runs"))
    data = ImageDataModule(str(root / "shards"), 20, image_size=8, augmentation=found.augmentation)
    raw = split_samples(data)
    files = []
    for sample in raw:
        files.append(root / "flat" / f"{sample['__index__']:02d}.png")
        files[-1].parent.mkdir(exist_ok=True)
        files[-1].write_bytes(sample["png"])
    predicted = mhla.predict("tiny", files, runs=root / "runs", top_k=4)
    kind = data.kind(split)
    pixels = torch.stack([kind.evaluate(sample)["image"] for sample in raw])
    task = found.task
    task.configure_model()
    assert task.backbone is not None
    found.weights.load(task.backbone)
    with torch.no_grad():
        wanted = task.eval()(pixels).softmax(-1)
    for row, probabilities in zip(predicted, wanted, strict=True):
        assert row.classes[0] == NAMES[int(probabilities.argmax())]
        torch.testing.assert_close(
            torch.tensor(row.probabilities), probabilities.sort(descending=True).values
        )


def mhla_split(root: Path) -> Any:
    return read_index(open_store(f"{root}/shards/val"))


def split_samples(data: ImageDataModule) -> list[dict[str, Any]]:
    (split,) = data.splits("val")
    return split.read(range(split.samples))


def test_the_command_shows_a_table_a_sheet_and_damage(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(root)
    shutil.copytree(root / "source" / "val" / "class0", root / "photos")
    (root / "photos" / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    (root / "photos" / "notes.txt").write_text("no image")
    assert main(["predict", "tiny", "photos", "--json", "rows.json"]) == 2
    said = capsys.readouterr()
    assert said.out.count("photos/0") == 5
    assert "5 images, 1 cannot be used" in said.out
    assert said.err.startswith("photos/broken.jpg: is no image that can be used")
    assert said.err.count("\n") == 1
    found = json.loads((root / "rows.json").read_text())
    assert [len(row.get("classes", [])) for row in found["rows"]] == [3] * 5 + [0]
    assert found["summary"]["classes"] == NAMES
    assert main(["predict", "tiny", "photos", "--to", "sheet.png"]) == 2
    with Image.open("sheet.png") as sheet:
        assert sheet.width > 128
    capsys.readouterr()
    assert main(["predict", "tiny", "photos/broken.jpg"]) == 2
    assert capsys.readouterr().err.startswith("error: photos/broken.jpg: is no image")


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"top_k": 0}, "top_k"),
        ({"batch_size": 0}, "batch_size"),
        ({"to": "sheet.jpg"}, "to"),
        ({"device": "none"}, "device"),
    ],
)
def test_wrong_options_are_refused(root: Path, options: Any, key: str) -> None:
    with refused(key):
        mhla.predict("tiny", root / "source", runs=root / "runs", **options)


def test_a_sheet_never_replaces_an_image_that_it_shows(root: Path) -> None:
    image = root / "source" / "val" / "class0" / "000.png"
    before = image.read_bytes()
    for given in (image, image.parent):
        command = ["predict", "tiny", str(given), "--runs", str(root / "runs"), "--to", str(image)]
        assert main(command) == 2
    assert image.read_bytes() == before


def test_places_without_images_are_refused(root: Path, tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "missing.jpg"):
        with refused("images"):
            mhla.predict("tiny", place, runs=root / "runs")


def test_auto_follows_the_data_module_of_a_plain_trainer(root: Path, tmp_path: Path) -> None:
    sizes = {"img_size": 8, "patch_size": 2, "embed_dim": 12, "depth": 1, "num_heads": 2}
    task = ClassificationTask("deit_tiny", {"name": "mhla", "blocks": 2}, sizes, num_classes="auto")
    data = ImageDataModule(str(root / "shards"), 16, image_size=8, reading=ReadingConfig(num_workers=0))
    trainer = pl.Trainer(
        accelerator="cpu", fast_dev_run=1, logger=False, enable_progress_bar=False, enable_model_summary=False
    )
    trainer.fit(task, datamodule=data)
    assert task.num_classes == 4
    assert task.hparams["num_classes"] == 4
    assert task.parameter_count == sum(value.numel() for value in task.parameters())
    alone = ClassificationTask("deit_tiny", "mhla", num_classes="auto")
    with refused("num_classes"):
        alone.configure_model()


def test_auto_without_classes_or_shards_is_refused(root: Path, tmp_path: Path) -> None:
    task = ClassificationTask("deit_tiny", "mhla", num_classes="auto")
    with refused("num_classes"):
        task.take_from_data({"kind": "images", "classes": 0, "image_size": (224, 224)})
    with refused("num_classes"):
        task.take_from_data({"kind": "images", "classes": 1, "image_size": (224, 224)})
    with refused(None):
        task.take_from_data({"kind": "latents"})
    values = read_run_recipe(RunFolder(root / "runs" / "tiny"))
    values["model"]["init_args"]["num_classes"] = "auto"
    values["data"]["init_args"]["path"] = str(tmp_path)
    with refused("model.num_classes"):
        resolve(values).take_from_data()
