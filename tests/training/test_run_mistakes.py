"""`mhla run` on mistakes of the user: exit code 2 and one line with the key or file, before any training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mhla_lightning.cli.main import main
from mhla_lightning.tasks import ClassificationTask
from mhla_lightning.training.session import check_split_weights
from tests.helpers.errors import refused


def damaged(shards: Path, tmp_path: Path, how: str) -> Path:
    """A copy of the shards with one thing wrong."""
    copy = tmp_path / f"damaged-{how}"
    shutil.copytree(shards, copy)
    shard = sorted((copy / "train").glob("*.tar"))[1]
    index = json.loads((copy / "train" / "index.json").read_text())
    if how == "missing":
        shard.unlink()
    elif how == "cut":
        shard.write_bytes(shard.read_bytes()[:-700])
    elif how == "flipped":
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 0xFF
        shard.write_bytes(data)
    elif how == "empty":
        shutil.rmtree(copy / "train")
        (copy / "train").mkdir()
    elif how == "format":
        (copy / "train" / "index.json").write_text(json.dumps({**index, "format": 99}))
    return copy


BAD_COMMANDS: list[tuple[str, list[str], str]] = [  # mistake, arguments, key as it is printed (or a part)
    ("unknown option of the verb", ["--bogus", "1"], "bogus: "),
    ("section", ["--modle.attention", "mhla"], "modle: "),
    ("trainer key", ["--trainer.max_step", "4"], "--trainer.max_step: "),
    ("task key", ["--model.atention", "mhla"], "--model.atention: "),
    ("nested key", ["--model.optimizer.learning_rate", "1"], "--model.optimizer.learning_rate: "),
    ("data key", ["--data.batchsize", "4"], "--data.batchsize: "),
    ("augmentation key", ["--data.augmentation.flip", "1"], "--data.augmentation.flip: "),
    ("no value", ["--trainer.max_steps"], "--trainer.max_steps: "),
    ("stray word", ["hello"], "unexpected argument 'hello'"),
    ("type", ["--trainer.max_steps", "many"], "--trainer.max_steps: 'many' "),
    ("nested type", ["--model.optimizer.lr", "fast"], "--model.optimizer.lr: 'fast' "),
    ("type of a choice", ["--model.checkpoint_activations", "all"], "--model.checkpoint_activations: 'all' "),
    ("compiled part", ["--model.compile", "layers"], "--model.compile: 'layers' "),
    ("compiler", ["--model.compile.backend", "fast"], "--model.compile.backend: "),
    ("compiler's key", ["--model.compile.level", "3"], "--model.compile.level: "),
    ("missing argument", ["--data", "{class_path: mhla_lightning.data.LatentDataModule}"], "--data.vae: "),
    ("class", ["--model.class_path", "mhla_lightning.tasks.ClassificationTsk"], "--model.class_path: "),
    ("no task", ["--model", "{class_path: mhla_lightning.data.ImageDataModule}"], "--model: "),
    ("callback", ["--trainer.callbacks", "[{class_path: torch.nn.Identity}]"], "--trainer.callbacks"),
    ("backbone", ["--model.backbone", "deit_tny"], "deit_tny"),
    ("backbone option", ["--model.backbone_options.dept", "4"], "dept"),
    ("attention", ["--model.attention", "mlha"], "mlha"),
    ("attention option", ["--model.attention.block", "3"], "'block'"),
    ("blocks", ["--model.attention.blocks", "3"], "blocks"),
    ("patch", ["--model.backbone_options.patch_size", "3"], "patch_size"),
    ("mix key", ["--data.path", "null", "--data.mix", "[{path: a, weigth: 3}]"], "--data.mix.0.weigth: "),
    ("mix and path", ["--data.mix", "[{path: a}]"], "data.path"),
    ("command as path", ["--data.path", "pipe:cat x"], "pipe:cat x"),
    ("address to pack", ["--data.path", "http://h/x", "--data.source", "mnist"], "data.source"),
    ("remote", ["--data.remote.retries", "-1"], "retries"),
    (
        "tokens",
        ["--data", "{class_path: mhla_lightning.data.TokenDataModule, init_args: {path: SHARDS}}"],
        "tokens",
    ),
    ("image size", ["--data.image_size", "16"], "image_size"),
    ("class count", ["--model.num_classes", "10"], "model.num_classes"),
    ("two lengths", ["--data.epochs", "2"], "--trainer.max_steps: "),
    ("no length", ["--trainer.max_steps", "null"], "--trainer.max_steps: "),
    ("accumulation", ["--trainer.accumulate_grad_batches", "2"], "--trainer.accumulate_grad_batches: "),
    ("batch", ["--data.micro_batch_size", "5"], "data.micro_batch_size"),
    ("number", ["--model.optimizer.lr", "3e-3x"], "--model.optimizer.lr: "),
    ("negative rate", ["--model.optimizer.lr", "-1"], "model.optimizer.lr"),
    ("seed", ["--seed_everything", "-3"], "--seed_everything: "),
    ("validation interval", ["--trainer.val_check_interval", "0.5"], "--trainer.val_check_interval: "),
    ("no steps", ["--trainer.max_steps", "0"], "--trainer.max_steps: "),
    ("save interval", ["--checkpoint.every_n_steps", "0"], "--checkpoint.every_n_steps: "),
    ("checkpoint to fit", ["--ckpt", "r"], "--ckpt: "),
    ("odd mixup", ["--model.mixup", "0.8", "--data.micro_batch_size", "1"], "odd"),
    ("no data", ["--data.path", "/nowhere"], "/nowhere"),
    ("precision", ["--trainer.precision", "bf8"], "--trainer.precision: 'bf8' "),
    ("run id", ["--run-id", "../x"], "--run-id: "),
    ("checkpoint", ["--mode", "validate", "--ckpt", "nothing"], "--ckpt: "),
    ("nothing to validate", ["--mode", "validate"], "RUNS"),
    ("init_from", ["--model.init_from", "/no/file"], "/no/file"),
    ("train_only", ["--model.train_only", "[nothing]"], "model.train_only"),
]


@pytest.mark.parametrize(
    ("arguments", "key"), [b[1:] for b in BAD_COMMANDS], ids=[b[0] for b in BAD_COMMANDS]
)
def test_a_mistake_is_one_line_and_exit_code_2(
    recipe: Path,
    shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    key: str,
) -> None:
    assert (
        main(["run", str(recipe), *(argument.replace("SHARDS", str(shards)) for argument in arguments)]) == 2
    )
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert key.replace("RUNS", str(tmp_path / "runs")) in error
    assert "\n" not in error
    assert not list((tmp_path / "runs").glob("*/checkpoints/step-*"))


@pytest.mark.parametrize(
    ("how", "place"),
    [
        ("missing", ".tar"),
        ("cut", ".tar"),
        ("flipped", ".tar"),
        ("empty", "train"),
        ("format", "index.json"),
    ],
)
def test_damaged_data_is_refused_before_training(
    recipe: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str, place: str
) -> None:
    folder = damaged(shards, tmp_path, how)
    assert main(["run", str(recipe), "--data.path", str(folder)]) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    assert str(folder) in error
    assert place in error


@pytest.mark.parametrize(
    "content",
    [
        b"trainer: {max_steps: 1, max_steps: 2}",
        b"trainer: [",
        b"\x00\xff\xfe",
        b"- a list",
    ],
    ids=["key twice", "open bracket", "binary", "list"],
)
def test_a_file_that_is_no_recipe_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    assert main(["run", str(path)]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"error: {path}: ")
    assert "\n" not in error


def test_a_recipe_without_a_section_or_a_file_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text("trainer: {}")
    assert main(["run", str(tmp_path / "mine.yaml")]) == 2
    assert capsys.readouterr().err.startswith("error: --model: ")
    assert main(["run", str(tmp_path / "absent.yaml")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: RECIPE: ")
    assert "absent.yaml" in error


@pytest.mark.parametrize("name", ["classification/deit_tiny_mhla_mnist_cp", "nothing"])
def test_an_unknown_recipe_names_the_known_ones(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", name]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: RECIPE: ")
    assert name in error
    assert "valid: classification/" in error
    assert ("did you mean 'classification/deit_tiny_mhla_mnist_cpu'?" in error) == name.endswith("_cp")


def test_a_mistyped_key_gets_the_nearest_one(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The wording counts here: found, allowed, nearest."""
    assert main(["run", str(recipe), "--model.atention", "mhla"]) == 2
    error = capsys.readouterr().err
    assert "unknown key 'atention'; did you mean 'attention'? valid: attention, backbone" in error


@pytest.mark.parametrize(
    "data",
    [["--data.path", "typo"], ["--data.path", "null", "--data.mix", "[{path: typo}]"]],
    ids=["path", "mix"],
)
def test_a_recipe_packs_its_source_into_its_own_path_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], data: list[str]
) -> None:
    """A mistyped path must not become a folder of digits that trains well."""
    monkeypatch.chdir(tmp_path)
    assert main(["run", "classification/deit_tiny_mhla_mnist_cpu", *data]) == 2
    assert "typo/train/index.json" in capsys.readouterr().err
    assert not (tmp_path / "typo").exists()


def test_a_refused_run_leaves_no_folder_and_an_older_one_stays(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = ["run", str(recipe), "--run-id", "r", "--data.micro_batch_size", "5"]
    assert main(refused) == 2
    assert not (tmp_path / "runs" / "r").exists()
    (tmp_path / "runs" / "r").mkdir(parents=True)
    (tmp_path / "runs" / "r" / "mine.txt").write_text("kept")
    assert main(refused) == 2
    assert (tmp_path / "runs" / "r" / "mine.txt").read_text() == "kept"
    assert "micro_batch_size" in capsys.readouterr().err


@pytest.mark.parametrize("strategy", ["zero3", "zero3_offload", {"name": "zero3"}], ids=str)
@pytest.mark.parametrize(("key", "value"), [("checkpoint_activations", "offload"), ("compile", "whole")])
def test_split_weights_exclude_offloading_and_compiling_as_one(strategy: Any, key: str, value: str) -> None:
    task = ClassificationTask("deit_tiny", num_classes=10, **{key: value})  # type: ignore[arg-type]
    with refused(key):
        check_split_weights(task, strategy)
    for other in ("zero2", "ddp", "auto", None):
        check_split_weights(task, other)
