"""`mhla sample` of images: equal images in any batch and process, stopped jobs, wrong input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mhla_lightning.backbones.layers import grid_sinusoid
from mhla_lightning.cli.main import main
from mhla_lightning.cli.sample import parse_classes
from mhla_lightning.diffusion import Guidance
from mhla_lightning.inference.diffusion.images import (
    Drawing,
    draw_batch,
    find_image_run,
    load_task,
    sample_images,
)
from tests.helpers.diffusion_models import train, write_recipe
from tests.helpers.errors import refused


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """The folder of a finished run with averaged weights."""
    root = tmp_path_factory.mktemp("sample")
    recipe = write_recipe(root / "tiny.yaml", shards)
    train(recipe, "one", "--runs", str(root / "runs"))
    return root / "runs" / "one"


def command(trained: Path, out: Path, *extra: str) -> list[str]:
    return [
        "sample",
        str(trained),
        "--n",
        "10",
        "--steps",
        "4",
        "--batch-size",
        "4",
        "--out",
        str(out),
        "--device",
        "cpu",
        *extra,
    ]


def drawn(out: Path) -> dict[str, np.ndarray]:
    with np.load(out / "samples.npz", allow_pickle=False) as file:
        return dict(file)


def test_npz_in_adms_layout_and_a_grid(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    assert (
        main(
            [
                *command(
                    trained, tmp_path / "out", "--classes", "1-2,0", "--json", str(tmp_path / "facts.json")
                )
            ]
        )
        == 0
    )
    images = drawn(tmp_path / "out")
    assert images["arr_0"].shape == (10, 8, 8, 3)
    assert images["arr_0"].dtype == np.uint8
    assert images["arr_1"].tolist() == [1, 2, 0, 1, 2, 0, 1, 2, 0, 1]
    with Image.open(tmp_path / "out" / "grid.png") as grid:
        assert grid.size == (3 * 9 + 1, 4 * 9 + 1), "a column a class"
        first = np.asarray(grid)[1:9, 1:9]
    assert np.array_equal(first, images["arr_0"][0])
    assert "averaged weights" in capsys.readouterr().out
    assert json.loads((tmp_path / "facts.json").read_text())["images"] == 10


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_an_image_is_the_same_in_any_batch(trained: Path, sampler: str) -> None:
    found, labels = find_image_run(str(trained)), [n % 4 for n in range(10)]
    task, drawing = load_task(found, "cpu"), Drawing(3, sampler, 5, Guidance(2.0))
    whole = sample_images(found, task, labels, drawing, batch_size=10).astype(int)
    for size in (1, 3):
        assert (
            np.abs(sample_images(found, task, labels, drawing, batch_size=size).astype(int) - whole).max()
            <= 1
        )
    other = sample_images(found, task, labels, replace(drawing, seed=4), batch_size=10).astype(int)
    assert np.abs(other - whole).mean() > 1
    assert np.abs(whole[0] - whole[4]).mean() > 1, "the same class twice, with other noise"


@pytest.mark.slow
def test_two_processes_draw_the_same_bits(trained: Path, tmp_path: Path) -> None:
    for processes in ("1", "2"):
        assert main(command(trained, tmp_path / processes, "--processes", processes)) == 0
    one, two = (drawn(tmp_path / processes) for processes in ("1", "2"))
    assert np.array_equal(one["arr_0"], two["arr_0"])
    assert np.array_equal(one["arr_1"], two["arr_1"])


@pytest.mark.slow
def test_a_killed_job_continues(trained: Path, tmp_path: Path) -> None:
    slow = ["--steps", "200", "--batch-size", "1"]
    with subprocess.Popen(
        [sys.executable, "-m", "mhla_lightning", *command(trained, tmp_path / "cut", *slow)]
    ) as process:
        deadline = time.monotonic() + 120
        while len(list((tmp_path / "cut").glob("parts/0*.npy"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    parts = {path.name: os.stat(path).st_mtime_ns for path in (tmp_path / "cut" / "parts").glob("0*.npy")}
    assert 2 <= len(parts) < 10
    assert not (tmp_path / "cut" / "samples.npz").exists()
    for name in ("cut", "whole"):
        assert main(command(trained, tmp_path / name, *slow)) == 0
    assert np.array_equal(drawn(tmp_path / "cut")["arr_0"], drawn(tmp_path / "whole")["arr_0"])
    kept = {path.name: os.stat(path).st_mtime_ns for path in (tmp_path / "cut" / "parts").glob("0*.npy")}
    assert kept.items() >= parts.items(), "what was drawn before is not drawn again"


def test_averaged_weights_are_the_default(trained: Path) -> None:
    with_average, raw = find_image_run(str(trained)), find_image_run(str(trained), ema=False)
    assert with_average.averaged
    assert not raw.averaged
    states = [load_task(found, "cpu").backbone.state_dict() for found in (with_average, raw)]  # type: ignore[union-attr]
    assert any(not torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_another_size_than_in_training(trained: Path, tmp_path: Path) -> None:
    """The same weights on a larger grid, with the matrices resampled and the positions of the formula."""
    assert find_image_run(str(trained), size=(8, 8)).size is None, "the size of training"
    assert main(command(trained, tmp_path / "wide", "--size", "8x16", "--n", "2")) == 0
    assert drawn(tmp_path / "wide")["arr_0"].shape == (2, 8, 16, 3)
    found = find_image_run(str(trained), size=(8, 16))
    model: Any = load_task(found, "cpu").backbone
    weights = find_image_run(str(trained)).weights.read()
    small: Any = load_task(find_image_run(str(trained)), "cpu").backbone
    expected = model.adapt_state_dict(weights, small.geometry)
    for name, value in expected.items():
        assert torch.equal(model.state_dict()[name], value), name
    assert torch.equal(model.pos_embed[0], grid_sinusoid((4, 8), model.embed_dim))


def test_drawing_touches_no_generator_of_the_process(trained: Path) -> None:
    found = find_image_run(str(trained))
    task = load_task(found, "cpu")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    draw_batch(found, task, [0, 1], range(2), Drawing(steps=3))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (["--classes", "0-4"], "--classes: class 4"),
        (["--classes", "2-1"], "--classes: '2-1'"),
        (["--sampler", "dmp"], "ddpm"),
        (["--sampler", "euler"], "euler"),
        (["--n", "0"], "--n: 0"),
        (["--steps", "1001"], "1001"),
        (["--guidance", "-1"], "-1"),
        (["--guidance-channels", "4"], "--guidance-channels: 4"),
        (["--guidance-interval", "0.6", "0.2"], "0.6"),
        (["--ckpt", "3"], "--ckpt: 3"),
        (["--device", "cuda:77"], "--device: cuda:77"),
        (["--size", "9x8"], "--size: this run cannot draw 9x8"),
    ],
)
def test_wrong_input(
    trained: Path, tmp_path: Path, extra: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(trained, tmp_path / "out", *extra)) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_of_other_images_is_kept(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(command(trained, out)) == 0
    before = drawn(out)["arr_0"]
    assert main(command(trained, out, "--seed", "1")) == 2
    assert "seed" in capsys.readouterr().err
    assert np.array_equal(drawn(out)["arr_0"], before)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert main(command(trained, tmp_path / "mine")) == 2
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_classes() -> None:
    assert parse_classes("0-3,7") == [0, 1, 2, 3, 7]
    with refused("classes"):
        parse_classes("0,x")


def test_other_runs_are_refused(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(recipe, "classifier", "--trainer.max_steps", "4")
    assert main(command(tmp_path / "runs" / "classifier", tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert "classifier: " in error
    assert "ClassificationTask" in error
