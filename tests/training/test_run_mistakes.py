"""`mhla run` on a user's mistakes: one sentence that names the key or file, exit code 2, before any
training.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mhla_lightning.cli.main import main


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


BAD_COMMANDS = [
    ("unknown option of the verb's", ["--bogus", "1"], ["unknown key 'bogus'", "trainer"]),
    ("section", ["--modle.attention", "mhla"], ["unknown key 'modle'", "did you mean 'model'"]),
    ("trainer key", ["--trainer.max_step", "4"], ["'trainer.max_step'", "did you mean 'trainer.max_steps'"]),
    ("task key", ["--model.atention", "mhla"], ["'model.atention'", "did you mean 'model.attention'"]),
    (
        "nested key",
        ["--model.optimizer.learning_rate", "1"],
        ["'model.optimizer.learning_rate'", "model.optimizer.lr"],
    ),
    ("data key", ["--data.batchsize", "4"], ["'data.batchsize'", "did you mean 'data.batch_size'"]),
    ("augmentation key", ["--data.augmentation.flip", "1"], ["'data.augmentation.flip'", "hflip"]),
    ("no value", ["--trainer.max_steps"], ["--trainer.max_steps has no value"]),
    ("stray word", ["hello"], ["unexpected argument 'hello'"]),
    ("type", ["--trainer.max_steps", "many"], ["trainer.max_steps: expected", "int", "many"]),
    ("nested type", ["--model.optimizer.lr", "fast"], ["model.optimizer.lr: expected float, got fast"]),
    (
        "class",
        ["--model.class_path", "mhla_lightning.tasks.ClassificationTsk"],
        ["did you mean 'ClassificationTask'"],
    ),
    (
        "backbone",
        ["--model.backbone", "deit_tny"],
        ["unknown backbone 'deit_tny'", "did you mean 'deit_tiny'"],
    ),
    ("backbone option", ["--model.backbone_options.dept", "4"], ["'dept'", "did you mean 'depth'"]),
    ("attention", ["--model.attention", "mlha"], ["unknown attention 'mlha'", "did you mean 'mhla'"]),
    (
        "attention option",
        ["--model.attention.block", "3"],
        ["option 'block' of attention 'mhla'", "did you mean 'blocks'"],
    ),
    (
        "blocks",
        ["--model.attention.blocks", "3"],
        ["blocks=3 does not fit an axis of 4 tokens", "use 2 or 4"],
    ),
    (
        "patch",
        ["--model.backbone_options.patch_size", "3"],
        ["img_size 8 is no multiple of patch_size 3", "use 6 or 9"],
    ),
    (
        "mix key",
        ["--data.path", "null", "--data.mix", "[{path: a, weigth: 3}]"],
        ["'data.mix.0.weigth'", "did you mean 'data.mix.0.weight'"],
    ),
    ("mix and path", ["--data.mix", "[{path: a}]"], ["data.path or data.mix"]),
    ("command as path", ["--data.path", "pipe:cat x"], ["'pipe:cat x/train' begins with 'pipe:'", "allowed"]),
    (
        "address to pack",
        ["--data.path", "http://h/x", "--data.source", "mnist"],
        ["data.source is packed into data.path", "folder of this machine"],
    ),
    ("remote", ["--data.remote.retries", "-1"], ["data.remote.retries", "-1", "from 0 on"]),
    (
        "tokens",
        ["--data", "{class_path: mhla_lightning.data.TokenDataModule, init_args: {path: SHARDS}}"],
        ["holds images; tokens are needed"],
    ),
    ("image size", ["--data.image_size", "16"], ["data.image_size is (16, 16)", "img_size (8, 8)"]),
    ("class count", ["--model.num_classes", "10"], ["model.num_classes is 10 and the data has 4"]),
    ("two lengths", ["--data.epochs", "2"], ["trainer.max_steps is 12 and data.epochs 2", "one length"]),
    ("no length", ["--trainer.max_steps", "null"], ["no length", "trainer.max_steps or data.epochs"]),
    (
        "accumulation",
        ["--trainer.accumulate_grad_batches", "2"],
        ["trainer.accumulate_grad_batches cannot be set", "data.batch_size"],
    ),
    ("batch", ["--data.micro_batch_size", "5"], ["data.micro_batch_size", "5"]),
    ("number", ["--model.optimizer.lr", "3e-3x"], ["model.optimizer.lr: expected float, got 3e-3x"]),
    ("negative rate", ["--model.optimizer.lr", "-1"], ["model.optimizer.lr is -1", "above 0"]),
    ("seed", ["--seed_everything", "-3"], ["seed_everything is -3"]),
    (
        "validation interval",
        ["--trainer.val_check_interval", "0.5"],
        ["trainer.val_check_interval is 0.5", "optimizer steps"],
    ),
    ("no steps", ["--trainer.max_steps", "0"], ["trainer.max_steps is 0", "from 1"]),
    ("save interval", ["--checkpoint.every_n_steps", "0"], ["checkpoint.every_n_steps is 0"]),
    ("checkpoint to fit", ["--ckpt", "r"], ["--ckpt belongs to --mode validate or test"]),
    ("odd mixup", ["--model.mixup", "0.8", "--data.micro_batch_size", "1"], ["micro batch of 1 is odd"]),
    ("no data", ["--data.path", "/nowhere"], ["/nowhere", "index.json"]),
    ("precision", ["--trainer.precision", "bf8"], ["bf8"]),
    ("run id", ["--run-id", "../x"], ["run id '../x'"]),
    ("checkpoint", ["--mode", "validate", "--ckpt", "nothing"], ["no run 'nothing'"]),
    ("nothing to validate", ["--mode", "validate"], ["has no checkpoint"]),
    ("init_from", ["--model.init_from", "/no/file"], ["model.init_from: /no/file does not exist"]),
    ("train_only", ["--model.train_only", "[nothing]"], ["model.train_only: 'nothing' matches no parameter"]),
]


@pytest.mark.parametrize(
    ("arguments", "words"), [b[1:] for b in BAD_COMMANDS], ids=[b[0] for b in BAD_COMMANDS]
)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    recipe: Path,
    shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: list[str],
) -> None:
    assert (
        main(["run", str(recipe), *(argument.replace("SHARDS", str(shards)) for argument in arguments)]) == 2
    )
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert "\n" not in error
    for word in words:
        assert word in error
    assert not list((tmp_path / "runs").glob("*/checkpoints/step-*"))


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("missing", ["train", ".tar", "missing"]),
        ("cut", [".tar", "bytes"]),
        ("flipped", [".tar", "sha256"]),
        ("empty", ["index.json"]),
        ("format", ["format", "99", "1"]),
    ],
)
def test_damaged_data_is_refused_before_training(
    recipe: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str, words: list[str]
) -> None:
    assert main(["run", str(recipe), "--data.path", str(damaged(shards, tmp_path, how))]) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    for word in words:
        assert word in error


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"trainer: {max_steps: 1, max_steps: 2}", "key 'max_steps' stands twice"),
        (b"trainer: [", "is no YAML"),
        (b"\x00\xff\xfe", "is no YAML"),
        (b"- a list", "a recipe is a mapping"),
        (b"trainer: {}", "it needs trainer, model and data"),
    ],
)
def test_a_file_that_is_no_recipe_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, words: str
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    assert main(["run", str(path)]) == 2
    error = capsys.readouterr().err.strip()
    assert words in error
    assert "\n" not in error
    assert main(["run", str(tmp_path / "absent.yaml")]) == 2
    assert "absent.yaml does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["classification/deit_tiny_mhla_mnist_cp", "nothing"])
def test_an_unknown_recipe_names_the_known_ones(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", name]) == 2
    error = capsys.readouterr().err
    assert f"unknown recipe '{name}'" in error
    assert "classification/deit_tiny_mhla_mnist_cpu" in error


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
    assert "typo/train/index.json does not exist" in capsys.readouterr().err
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
