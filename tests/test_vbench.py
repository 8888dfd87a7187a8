"""The folder that VBench expects, and what is said where its package is missing."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

from mhla_lightning.cli.main import main
from mhla_lightning.errors import UserError
from mhla_lightning.evaluation.vbench import ANY_PROMPT, DIMENSIONS, Package, check_dimensions, find_package, lay_out, sampled_videos
from tests.diffusion_models import train
from tests.video_runs import write_clips, write_recipe

without_vbench = pytest.mark.skipif(importlib.util.find_spec("vbench") is not None, reason="VBench is installed")


@pytest.fixture
def sampled(tmp_path: Path) -> Path:
    """A folder as `mhla sample` leaves it; what the videos show does not matter."""
    folder = tmp_path / "videos"
    folder.mkdir()
    videos = [
        (f"{number:04d}-x.mp4", prompt)
        for number, prompt in enumerate(["a stop sign, in a still frame", "Ein Ball-2", "a stop sign, in a still frame"])
    ]
    for name, _ in videos:
        (folder / name).write_bytes(name.encode())
    (folder / "samples.json").write_text(json.dumps({"videos": [{"file": name, "prompt": prompt} for name, prompt in videos]}))
    return folder


def test_names_give_prompt_and_index_back(sampled: Path, tmp_path: Path) -> None:
    videos = sampled_videos(sampled)
    for _ in range(2):  # again over itself
        names = lay_out(videos, tmp_path / "out")
    assert names == ["a stop sign, in a still frame-0.mp4", "Ein Ball-2-0.mp4", "a stop sign, in a still frame-1.mp4"]
    for (file, prompt), name in zip(videos, names, strict=True):
        assert (tmp_path / "out" / name).read_bytes() == file.read_bytes()
        assert re.sub(r"-\d+$", "", Path(name).stem) == prompt, "the rule by which VBench reads a prompt from a name"
    lay_out(videos[:1], tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == names[:1], "videos of an earlier call would be measured too"


@pytest.mark.parametrize("prompt", ["a/b", "..", "", "x" * 300])
def test_prompts_that_are_no_names(sampled: Path, tmp_path: Path, prompt: str) -> None:
    with pytest.raises(UserError, match="cannot be a file's name"):
        lay_out([(sampled / "0000-x.mp4", prompt)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_with_other_files_is_left_alone(sampled: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    (tmp_path / "mine" / "film.mp4").write_text("mine too")
    with pytest.raises(UserError, match=r"holds notes\.txt"):
        lay_out(sampled_videos(sampled), tmp_path / "mine")
    assert len(list((tmp_path / "mine").iterdir())) == 2


@pytest.mark.parametrize("name", ["../secret.mp4", "/etc/passwd", "gone.mp4"])
def test_a_list_that_leaves_its_folder(sampled: Path, name: str) -> None:
    (sampled / "samples.json").write_text(json.dumps({"videos": [{"file": name, "prompt": "a"}]}))
    with pytest.raises(UserError, match="is no video in that folder"):
        sampled_videos(sampled)


def test_a_folder_is_prepared(sampled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = tmp_path / "facts.json"
    assert main(["eval", "vbench", str(sampled), "--prepare", "--json", str(facts)]) == 0
    assert "3 videos of 2 prompts" in capsys.readouterr().out
    assert len(list((sampled / "vbench" / "videos").glob("*.mp4"))) == 3
    assert json.loads(facts.read_text())["summary"]["videos"] == 3


@without_vbench
def test_without_the_package_the_folder_is_prepared_and_the_way_to_it_told(sampled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert find_package() is None
    assert main(["eval", "vbench", str(sampled), "--to", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "VBench is not installed; 3 videos of 2 prompts are in" in said
    assert "pip install vbench" in said
    assert said.count("\n") == 1
    assert len(list((tmp_path / "out" / "videos").glob("*.mp4"))) == 3


@without_vbench
def test_a_run_is_sampled_with_prompts_of_the_users(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(write_recipe(tmp_path / "tiny.yaml", write_clips(tmp_path)), "one", "--runs", str(tmp_path / "runs"), "--trainer.max_steps", "4")
    asked = ["eval", "vbench", "one", "--runs", str(tmp_path / "runs"), "--steps", "2", "--device", "cpu", "--prepare"]
    assert main(asked) == 2
    assert "give others with --prompts FILE" in capsys.readouterr().err
    (tmp_path / "p.txt").write_text("a bar moves right\na bar moves down\n")
    assert main([*asked, "--prompts", str(tmp_path / "p.txt"), "--to", str(tmp_path / "out"), "--n", "2"]) == 0
    wanted = [f"a bar moves {where}-{index}.mp4" for where in ("down", "right") for index in range(2)]
    assert sorted(path.name for path in (tmp_path / "out" / "videos").iterdir()) == wanted


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (["--python", "/no/such/python"], "cannot be started"),
        (["--python", "/bin/false"], "is no Python interpreter"),
        (["--dimensions", "colour"], "did you mean 'color'"),
        (["--prompts", "p.txt"], "--prompts is for runs"),
    ],
)
def test_wrong_input(sampled: Path, extra: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "vbench", str(sampled), *extra]) == 2
    assert says in capsys.readouterr().err


def test_prompts_of_the_package_come_once(tmp_path: Path) -> None:
    entries = [{"prompt_en": "a", "dimension": ["color"]}, {"prompt_en": "b", "dimension": ["scene"]}, {"prompt_en": "a", "dimension": ["scene"]}]
    (tmp_path / "VBench_full_info.json").write_text(json.dumps(entries))
    assert Package(sys.executable, tmp_path).prompts() == ["a", "b"]
    with pytest.raises(UserError, match=r"VBench_full_info\.json"):
        Package(sys.executable, tmp_path / "gone").prompts()


def test_dimensions_of_other_prompts() -> None:
    check_dimensions(DIMENSIONS, standard=True)
    check_dimensions(ANY_PROMPT, standard=False)
    with pytest.raises(UserError, match="VBench's own prompts"):
        check_dimensions(["color"], standard=False)
