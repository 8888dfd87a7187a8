"""`mhla sample` of images of prompts: files, sizes, equal images in any batch, stopped jobs, wrong input."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mhla_lightning.cli.main import main
from tests.helpers.text_images import write_recipe

pytestmark = pytest.mark.slow  # a run with an autoencoder of diffusers


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train four steps; images are noise, but their own for each prompt."""
    root = tmp_path_factory.mktemp("prompts")
    recipe = write_recipe(root / "recipe.yaml", root)
    callbacks = "[{class_path: mhla_lightning.callbacks.EMA, init_args: {decay: 0.9}}]"
    given = ["run", str(recipe), "--runs", str(root / "runs"), "--run-id", "bars"]
    assert main([*given, "--trainer.callbacks", callbacks]) == 0
    (root / "prompts.txt").write_text("a bar at the left\n\na bar at the top\n")
    return root


def sample(root: Path, out: Path, *arguments: str) -> int:
    given = ["sample", "bars", "--runs", str(root / "runs"), "--out", str(out), "--steps", "2"]
    return main([*given, *arguments])


def drawn(out: Path) -> np.ndarray:
    rows = json.loads((out / "samples.json").read_text())["images"]
    return np.stack([pixels(out / row["file"]) for row in rows]).astype(int)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_prompts_of_a_file_become_files(root: Path, tmp_path: Path) -> None:
    prompts = ["--prompts", str(root / "prompts.txt"), "--n", "2"]
    assert sample(root, tmp_path / "one", *prompts) == 0
    listed = json.loads((tmp_path / "one" / "samples.json").read_text())
    assert (listed["height"], listed["width"]) == (32, 32)
    assert [(row["file"], row["image"]) for row in listed["images"]] == [
        ("0000-a-bar-at-the-left.png", 0),
        ("0001-a-bar-at-the-left.png", 1),
        ("0002-a-bar-at-the-top.png", 0),
        ("0003-a-bar-at-the-top.png", 1),
    ]
    assert pixels(tmp_path / "one" / "grid.png").shape == (2 * 33 + 1, 2 * 33 + 1, 3)
    images = drawn(tmp_path / "one")
    assert len(np.unique(images.reshape(4, -1), axis=0)) == 4
    assert sample(root, tmp_path / "single", *prompts, "--batch-size", "1") == 0
    assert np.abs(drawn(tmp_path / "single") - images).max() <= 1
    assert sample(root, tmp_path / "other", *prompts, "--guidance", "1") == 0
    assert np.abs(drawn(tmp_path / "other") - images).max() > 1

    (tmp_path / "single" / "parts" / "00000002.npy").unlink()
    (tmp_path / "single" / "samples.json").unlink()
    assert sample(root, tmp_path / "single", *prompts, "--batch-size", "1") == 0
    assert np.abs(drawn(tmp_path / "single") - images).max() <= 1


def test_images_of_another_size(root: Path, tmp_path: Path) -> None:
    assert sample(root, tmp_path / "wide", "--prompt", "a bar", "--size", "48x64") == 0
    assert drawn(tmp_path / "wide").shape == (1, 48, 64, 3)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--prompts: no prompt was given"),
        (["--prompt", "a", "--classes", "0"], "--classes: only for runs that draw images; run bars draws"),
        (["--prompt", "a", "--frames", "3"], "--frames: only for runs that draw videos"),
        (["--prompt", "a", "--size", "30x32"], "--size: run bars cannot draw 30x32"),
        (["--prompt", "a", "--size", "4x32"], "height 1; use 2"),
        (["--prompt", "one two three four five six seven"], "--prompt: "),
        (["--prompt", "a", "--sampler", "ddim"], "ddim"),
        (["--prompt", "a", "--guidance-channels", "9"], "--guidance-channels"),
    ],
    ids=str,
)
def test_wrong_input_is_one_sentence(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    assert sample(root, tmp_path / "out", *arguments) == 2
    sentence = capsys.readouterr().err
    assert says in sentence
    assert sentence.count("\n") == 1
    assert not (tmp_path / "out").exists()
