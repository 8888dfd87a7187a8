"""LightningCLI over recipes: what `lightning run` does, in Lightning's words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml

from mhla_lightning.cli.main import main as mhla
from mhla_lightning.config.recipes import recipe_names
from mhla_lightning.lightning_cli import RecipeCLI, main
from mhla_lightning.runs.folder import RunFolder, read_metrics
from mhla_lightning.training.launch import RunOptions, launch
from tests.helpers.errors import refused
from tests.helpers.images import write_images
from tests.helpers.sana_models import SMALL, save_pipeline
from tests.helpers.vaes import save_captioned

DEIT, CONVNET = "classification/deit_tiny_mhla_mnist_cpu", "classification/convnet_mnist_cpu"
IMAGES = "classification/deit_tiny_mhla_images_cpu"
SHORT = {
    "trainer.max_steps": 2,
    "trainer.log_every_n_steps": 1,
    "trainer.limit_val_batches": 1,
    "trainer.val_check_interval": 2,
}


class Kept(RecipeCLI):
    """Keeps what Lightning's hook behind `fit` sees."""

    steps = 0

    def after_fit(self) -> None:
        self.steps = self.trainer.global_step


def words(overrides: dict[str, Any]) -> list[str]:
    return [word for key, value in overrides.items() for word in (f"--{key}", str(value))]


def losses(folder: Path) -> dict[str, list[tuple[int, float]]]:
    series = read_metrics(RunFolder(folder).metrics)
    return {tag: values for tag, values in series.items() if tag.startswith(("train/loss", "val"))}


def door_and_run(recipe: str, root: Path, overrides: dict[str, Any]) -> Kept:
    """Train a recipe by both commands; assert equal numbers."""
    place = ["--runs", str(root), "--run-id", "door"]
    cli = Kept(["fit", "--config", recipe, *place, *words(overrides)])
    assert cli.launched is not None
    assert cli.launched.code == 0
    assert launch(recipe, overrides, RunOptions(str(root), "run")) == 0
    curves = losses(root / "door")
    assert curves == losses(root / "run")
    assert len(curves["train/loss"]) == 2
    assert (root / "door" / "recipe.yaml").read_text() == (root / "run" / "recipe.yaml").read_text()
    return cli


@pytest.mark.parametrize("recipe", [DEIT, CONVNET])
def test_a_packaged_recipe_trains_as_a_run(recipe: str, shards: Path, tmp_path: Path) -> None:
    overrides = {**SHORT, "data.path": shards, "data.batch_size": 16, "model.num_classes": 4}
    cli = door_and_run(recipe, tmp_path, {key: str(value) for key, value in overrides.items()} | SHORT)
    assert cli.steps == 2
    assert cli.model is cli.resolved.task
    if recipe == DEIT:
        return
    place = ["--runs", str(tmp_path), "--run-id", "door", *words(overrides)]
    looked = RecipeCLI(["validate", "-c", recipe, "--ckpt_path", str(tmp_path / "door"), *place])
    measured = looked.trainer.callback_metrics
    assert {tag: float(value) for tag, value in measured.items()} == {
        tag: values[-1][1] for tag, values in losses(tmp_path / "door").items() if tag.startswith("val")
    }
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    file = tmp_path / "predictions.pt"
    assert main(["predict", "-c", recipe, *place, "--predictions", str(file)]) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path != file} == before
    found = torch.load(file, weights_only=True)
    names = {key for part in found for key in part["key"]}
    logits = torch.cat([part["logits"] for part in found])
    assert len(names) == len(logits) == looked.datamodule.index("val").samples
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    again: Any = trainer.predict(looked.model, looked.datamodule)
    assert torch.equal(logits, torch.cat([part["logits"] for part in again]))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [name for name in recipe_names() if name.endswith("_cpu")])
def test_every_packaged_cpu_recipe_trains_as_a_run(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the data that it names, or with images in the place of a user's."""
    monkeypatch.chdir(tmp_path)
    own = {"data.source": str(write_images(tmp_path / "own").with_name("source"))} if recipe == IMAGES else {}
    door_and_run(recipe, tmp_path / "runs", SHORT | own)


@pytest.mark.slow  # diffusers, a text encoder, and seven commands
def test_images_with_captions_fine_tune_sana(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user would: a folder to latents, weights of SANA, the packaged recipe, samples, an export."""
    monkeypatch.chdir(tmp_path)
    save_pipeline(Path("sana"))
    save_captioned(Path("photos"), 12)
    text = {"name": "sana", "tokens": 80, "channels": 24, "instruction": "sana"}
    encode = ["data", "latents", "photos", "latents", "--vae", "sana", "--text-encoder", "sana"]
    encode += ["--instruction", "sana", "--tokens", "80", "--size", "16", "--val", "4", "--device", "cpu"]
    assert mhla(encode) == 0
    blocks = ["--attention", "{name: mhla, blocks: 2}"]
    assert mhla(["import", "sana", "sana", "--out", "start.safetensors", *blocks]) == 0
    sizes = {**SMALL, "input_size": 4, "in_channels": 8, "text_dim": 24, "text_length": 80}
    own = {
        "trainer.accelerator": "cpu",
        "trainer.precision": "32-true",
        "model.init_from": "start.safetensors",
        "model.attention.blocks": 2,
        "model.backbone_options": sizes,
        "data.path": "latents",
        "data.batch_size": 4,
        "data.reading.num_workers": 0,
        "data.vae": {"name": "sana", "scale": 0.4, "shift": 0.0, "shape": [8, 4, 4]},
        "data.text_encoder": text,
    }
    door_and_run("text_to_image/sana_600m_mhla_finetune", tmp_path / "runs", SHORT | own)
    for folder in (tmp_path / "sana" / "text_encoder", tmp_path / "latents"):
        folder.rename(folder.with_name("away"))
    drawn = ["sample", "door", "--runs", "runs", "--prompt", "a red cat", "--out", "drawn", "--steps", "2"]
    assert mhla(drawn) == 2, "prompts need the text encoder"
    (tmp_path / "sana" / "away").rename(tmp_path / "sana" / "text_encoder")
    assert mhla([*drawn, "--size", "16x16", "--n", "2"]) == 0
    assert len(list(Path("drawn").glob("*-a-red-cat.png"))) == 2
    assert mhla(["export", "door", "--runs", "runs", "--to", "exported", "--format", "diffusers"]) == 0
    assert mhla(["import", "sana", "exported", "--out", "again.safetensors"]) == 0


@pytest.mark.slow  # seconds for each model of 341M parameters, without weights
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU these recipes need their data")
@pytest.mark.parametrize("name", ["gla", "gated_deltanet", "mamba2"])
def test_a_recipe_for_cuda_is_refused_on_a_cpu(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = f"language/lm_340m_{name}_fineweb_edu"
    for train in (
        lambda: RecipeCLI(["fit", "--config", recipe, "--runs", "runs"]),
        lambda: launch(recipe, {}, RunOptions("runs")),
    ):
        with refused("model.attention.name"):
            train()
    assert list(tmp_path.iterdir()) == []


def test_the_recipe_is_read_as_by_a_run(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A module of the user's, a preset as a mapping, an older name of a key, our own sections."""
    values = yaml.safe_load(recipe.read_text())
    values["imports"] = ["a_module_of_a_user"]
    values["trainer"]["strategy"] = {"name": "zero2", "zero_optimization": {"overlap_comm": False}}
    values["data"]["init_args"]["seed"] = 3  # now data.order.seed
    values["health"] = {"max_skipped": 1}
    recipe.write_text(yaml.safe_dump(values))
    (tmp_path / "a_module_of_a_user.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    given = ["--model.attention", "softmax", "--trainer.matmul_precision", "high"]
    cli = RecipeCLI(["--config", str(recipe), *given], run=False)
    assert (cli.model.attention, cli.datamodule.seed, cli.resolved.health.max_skipped) == ("softmax", 3, 1)
    assert cli.launched is None
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        RecipeCLI(["fit", "--config", str(recipe), "--print_config", *given])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert mhla(["run", str(recipe), "--print_config", *given]) == 0
    assert capsys.readouterr().out == shown


def test_mistakes_are_those_of_a_run(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", str(recipe), "--trainer.max_stepz", "2"]) == 2
    assert "--trainer.max_stepz" in capsys.readouterr().err
    with refused("ckpt"):
        RecipeCLI(["fit", "--config", str(recipe), "--ckpt_path", "x"])
    with refused("args"):
        RecipeCLI({"fit": {}})  # type: ignore[arg-type]
    for given, key in ((["predict"], "predictions"), (["fit", "--predictions", "x.pt"], "predictions")):
        with refused(key):
            RecipeCLI([*given, "--config", str(recipe)])
    for taken in (recipe, recipe.parent / "no" / "x.pt"):
        with refused("predictions"):
            RecipeCLI(["predict", "--config", str(recipe), "--predictions", str(taken)])
    for wrong in (["fit"], ["guess", "--config", str(recipe)], []):
        with pytest.raises(SystemExit) as stopped:
            RecipeCLI(wrong)
        assert stopped.value.code == 2
    with pytest.raises(SystemExit):
        RecipeCLI(["fit", "--help"])
    shown = capsys.readouterr().out
    assert "--checkpoint.every_n_steps" in shown
    assert "--run-id" in shown
