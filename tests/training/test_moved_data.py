"""Where data is makes no difference to a resume; other data does, at the same place too."""

from __future__ import annotations

import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mhla_lightning.cli.main import main
from mhla_lightning.config.resolve import changed_keys
from mhla_lightning.data.index import VAE
from mhla_lightning.data.prepare.text.tokenize import TextOptions, tokenize
from mhla_lightning.runs.folder import read_metrics
from tests.helpers.language_runs import RECIPE


def write(folder: Path, word: str) -> None:
    folder.mkdir()
    for number in range(40):
        count = 8 + int(np.random.default_rng(number).integers(9))
        (folder / f"{number:02d}.txt").write_text(f"{word} " * count)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 10 steps on `shards`, which it has packed itself, and on a mixture of two such sets."""
    folder = tmp_path_factory.mktemp("trained")
    write(folder / "source", "cat")
    data = f"source: {folder / 'source'}, text: {{tokenizer: bytes, length: 32, val_length: 64, val: 6}}, "
    text = RECIPE.replace("init_args: {path: PATH, ", f"init_args: {{path: shards, {data}")
    (folder / "tiny.yaml").write_text(text)
    tokenize([str(folder / "source")], folder / "shards", TextOptions(length=32, val_length=64, val=6))
    write(folder / "more", "dog")
    tokenize([str(folder / "more")], folder / "others", TextOptions(length=32, val_length=64, val=6))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["run", "tiny.yaml", "--run-id", "r", "--checkpoint.keep_last", "3"]) == 0
        mix = ["--data.path", "null", "--data.mix", "[{path: shards}, {path: others, weight: 0.5}]"]
        assert main(["run", "tiny.yaml", "--run-id", "mix", "--checkpoint.keep_last", "3", *mix]) == 0
    return folder


@pytest.fixture
def stopped(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder with both runs as a kill after step 5 leaves them."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    for run in ("r", "mix"):
        shutil.rmtree(tmp_path / "runs" / run / "checkpoints" / "step-00000010")
        (tmp_path / "runs" / run / "summary.json").unlink()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MHLA_RUNS", raising=False)
    return tmp_path


def resume(*words: str, run: str = "r") -> int:
    return main(["run", "tiny.yaml", "--run-id", run, *words])


def losses(folder: Path, run: str) -> list[tuple[int, float]]:
    return read_metrics(folder / "runs" / run / "metrics.jsonl")["train/loss"]


def test_moved_data_resumes_with_the_next_sample(stopped: Path, trained: Path) -> None:
    (stopped / "shards").rename(stopped / "elsewhere")
    (stopped / "others").rename(stopped / "yonder")
    assert resume("--data.path", "elsewhere") == 0
    assert losses(stopped, "r") == losses(trained, "r")
    mix = ["--data.path", "null", "--data.mix", "[{path: elsewhere}, {path: yonder, weight: 0.5}]"]
    assert resume(*mix, run="mix") == 0
    assert losses(stopped, "mix") == losses(trained, "mix")


def test_other_data_is_a_change_at_any_place(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert resume("--data.path", "others") == 2
    assert "the run was trained on data" in capsys.readouterr().err
    shutil.rmtree(stopped / "shards" / "val")
    shutil.copytree(stopped / "others" / "val", stopped / "shards" / "val")  # rebuilt in place
    assert resume() == 2
    assert "validated on other data than the val split of shards" in capsys.readouterr().err
    shutil.rmtree(stopped / "shards")
    shutil.copytree(stopped / "others", stopped / "shards")
    assert resume() == 2
    assert "the run was trained on data" in capsys.readouterr().err
    mix = ["--data.path", "null", "--data.mix", "[{path: others}, {path: shards, weight: 0.5}]"]
    assert resume(*mix, run="mix") == 2
    assert "the run was trained on data" in capsys.readouterr().err


@pytest.mark.slow
def test_other_validation_data_can_be_accepted(stopped: Path) -> None:
    shutil.rmtree(stopped / "shards" / "val")
    shutil.copytree(stopped / "others" / "val", stopped / "shards" / "val")
    assert resume("--accept-changes") == 0


LATENTS: dict[str, Any] = {
    "trainer": {},
    "model": {"class_path": "mhla_lightning.tasks.ImageDiffusionTask", "init_args": {}},
    "data": {
        "class_path": "mhla_lightning.data.LatentDataModule",
        "init_args": {
            "path": "here",
            "vae": {"name": "/old/vae", "scale": 0.5, "shift": 0.0, "shape": [4, 8, 8], "sha256": "a" * 64},
            "text_encoder": {"name": "/old/t5", "tokens": 8, "channels": 4},
        },
    },
}
CLIPS: dict[str, Any] = {
    "trainer": {},
    "model": {"class_path": "mhla_lightning.tasks.VideoDiffusionTask", "init_args": {}},
    "data": {
        "class_path": "mhla_lightning.data.ClipDataModule",
        "init_args": {
            "path": "here",
            "source": "films",
            "text_encoder": {"name": "words:64", "tokens": 8, "channels": 64},
            "clips": {"frames": 8, "size": 32, "rate": 8.0, "stride": None, "flip": 0.5},
        },
    },
}


@pytest.mark.parametrize(
    ("recipe", "changes", "found"),
    [
        (LATENTS, {"path": "there"}, []),
        (LATENTS, {"vae.name": "/new/vae", "vae.sha256": None}, []),
        (LATENTS, {"text_encoder.name": "/new/t5"}, []),
        (LATENTS, {"vae.scale": 0.6}, ["vae.scale"]),
        (LATENTS, {"text_encoder.tokens": 9}, ["text_encoder.tokens"]),
        (CLIPS, {"path": "there", "source": None, "clips.frames": None, "clips.size": None}, []),
        (CLIPS, {"clips.frames": 9}, ["frames"]),
        (CLIPS, {"source": None, "clips.flip": 0.0}, ["flip"]),
        (CLIPS, {"text_encoder.name": "words:65"}, ["text_encoder.name"]),
    ],
)
def test_places_are_no_changes(recipe: dict[str, Any], changes: dict[str, Any], found: list[str]) -> None:
    """The encoder of clips runs while they are loaded, so its name is what it does."""
    new = deepcopy(recipe)
    for key, value in changes.items():
        *parents, last = key.split(".")
        here = new["data"]["init_args"]
        for parent in parents:
            here = here[parent]
        here[last] = value
    assert changed_keys(recipe, new) == [f"data.init_args.{key}" for key in found]


def test_a_vae_is_known_by_its_hash() -> None:
    def vae(name: str, sha256: str | None) -> VAE:
        return VAE(name, 0.5, 0.0, (4, 8, 8), sha256=sha256)

    assert vae("/new", "a").fits(vae("/old", "a"))
    assert not vae("/old", "b").fits(vae("/old", "a"))
    assert not vae("/new", None).fits(vae("/old", "a"))
    assert vae("/old", None).fits(vae("/old", "a"))
    assert not vae("/new", "a").fits(vae("/old", None))
