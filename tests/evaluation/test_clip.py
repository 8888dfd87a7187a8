"""The CLIP score against a computation by hand, and the errors without a model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mhla_lightning.cli.main import main
from mhla_lightning.evaluation import with_options
from mhla_lightning.evaluation.clip import ClipScorer, fix_clip
from tests.helpers.errors import refused
from tests.helpers.sampled_images import save_clip, write_sampled

pytest.importorskip("transformers", reason="transformers is in the extra 'diffusion'")
PROMPTS = ["a cat", "dog", "the quick brown fox jumps"]  # the last one is longer than the model reads
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_clip(tmp_path_factory.mktemp("clip") / "model")


def by_hand(clip: str, files: list[Path], prompts: list[str]) -> list[float]:
    """The score of each pair from the two towers, letter by letter and pixel by pixel."""
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(clip).eval()
    vocabulary = json.loads((Path(clip) / "vocab.json").read_text())
    scores = []
    for file, prompt in zip(files, prompts, strict=True):
        letters = [part for word in prompt.split() for part in [*word[:-1], f"{word[-1]}</w>"]]
        ids = [vocabulary[x] for x in ("<|startoftext|>", *letters[:10], "<|endoftext|>")]
        pixels = (np.asarray(Image.open(file)) / 255 - MEAN) / STD
        image = torch.tensor(pixels, dtype=torch.float32).permute(2, 0, 1)[None]
        with torch.no_grad():
            seen = model.visual_projection(model.vision_model(image).pooler_output)[0]
            read = model.text_projection(model.text_model(torch.tensor([ids])).pooler_output)[0]
        scores.append(100 * max(0.0, float(seen @ read / seen.norm() / read.norm())))
    return scores


@pytest.mark.slow  # imports CLIP of transformers: many seconds
def test_the_score_is_the_mean_of_pairs_computed_by_hand(
    clip: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = write_sampled(tmp_path / "drawn", PROMPTS)
    target = tmp_path / "clip.json"
    given = ["eval", "clip", str(tmp_path / "drawn"), "--clip", clip, "--device", "cpu"]
    assert main([*given, "--json", str(target)]) == 0
    expected = by_hand(clip, files, PROMPTS)
    found = json.loads(target.read_text())
    assert found["rows"][0]["clip_score"] == pytest.approx(np.mean(expected), abs=1e-3)
    assert found["summary"]["shortened"] == 1
    assert "1 prompts" in capsys.readouterr().out
    images = [np.asarray(Image.open(file)) for file in files]
    np.testing.assert_allclose(ClipScorer(clip).scores(images, PROMPTS), expected, atol=1e-3)
    assert len(set(expected)) == 3


@pytest.mark.slow  # as above
def test_models_that_cannot_judge_are_refused(
    clip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import CLIPModel

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with refused("clip") as error:
        ClipScorer("nobody/nothing")
    assert "hf download nobody/nothing" in error.value.reason
    (tmp_path / "empty").mkdir()
    half = Path(save_clip(tmp_path / "half"))
    CLIPModel.from_pretrained(clip).text_model.save_pretrained(half)
    (half / "config.json").write_text((Path(clip) / "config.json").read_text())
    for folder in (tmp_path / "empty", half):
        with refused("clip") as error:
            ClipScorer(str(folder))
        assert str(folder) in error.value.reason


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ({}, "prompts"),
        ({"prompts": "p", "n": 0}, "n"),
        ({"prompts": "p", "size": [4]}, "size"),
        ({"prompts": "p", "guidance": "x"}, "guidance"),
        ({"prompts": "nowhere.txt"}, "prompts"),
    ],
)
def test_options_that_cannot_be(given: dict[str, object], key: str) -> None:
    with refused(key):
        with_options("clip", given)


def test_contents_identify_prompts_and_model(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a cat")
    clip = str(tmp_path)
    (tmp_path / "model.safetensors").write_text("weights")
    first = with_options("clip", {"prompts": str(tmp_path / "p.txt"), "clip": clip})
    (tmp_path / "p.txt").write_text("a dog")
    second = with_options("clip", {"prompts": str(tmp_path / "p.txt"), "clip": clip})
    assert first.options == second.options
    assert first.identity["prompts"] != second.identity["prompts"]
    assert first.identity["clip"] == second.identity["clip"]
    (tmp_path / "model.safetensors").write_text("others")
    assert fix_clip(second.options, None)[1]["clip"] != first.identity["clip"]


@pytest.mark.parametrize("option", ["--n 2", "--size 8x8", "--steps 3", "--prompts p.txt", "--fresh"])
def test_options_of_runs_are_refused_for_drawn_images(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_sampled(tmp_path / "drawn", ["a"])
    assert main(["eval", "clip", str(tmp_path / "drawn"), *option.split()]) == 2
    said = capsys.readouterr().err
    assert f"{option.split()[0]}: " in said
    assert said.count("\n") == 1
