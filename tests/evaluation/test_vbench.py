"""The folder that VBench expects, and the errors without its package."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

from mhla_lightning.cli.main import main
from mhla_lightning.evaluation.vbench import (
    ANY_PROMPT,
    DIMENSIONS,
    Package,
    check_dimensions,
    find_package,
    lay_out,
    sampled_videos,
)
from tests.helpers.diffusion_models import train
from tests.helpers.errors import refused
from tests.helpers.video_runs import write_clips, write_recipe

without_vbench = pytest.mark.skipif(
    importlib.util.find_spec("vbench") is not None, reason="VBench is installed"
)


@pytest.fixture
def sampled(tmp_path: Path) -> Path:
    """A folder like one of `mhla sample`; the content of the videos does not matter."""
    folder = tmp_path / "videos"
    folder.mkdir()
    videos = [
        (f"{number:04d}-x.mp4", prompt)
        for number, prompt in enumerate(
            ["a stop sign, in a still frame", "Ein Ball-2", "a stop sign, in a still frame"]
        )
    ]
    for name, _ in videos:
        (folder / name).write_bytes(name.encode())
    (folder / "samples.json").write_text(
        json.dumps({"videos": [{"file": name, "prompt": prompt} for name, prompt in videos]})
    )
    return folder


def test_names_give_prompt_and_index_back(sampled: Path, tmp_path: Path) -> None:
    videos = sampled_videos(sampled)
    for _ in range(2):  # again over itself
        names = lay_out(videos, tmp_path / "out")
    assert names == [
        "a stop sign, in a still frame-0.mp4",
        "Ein Ball-2-0.mp4",
        "a stop sign, in a still frame-1.mp4",
    ]
    for (file, prompt), name in zip(videos, names, strict=True):
        assert (tmp_path / "out" / "videos" / name).read_bytes() == file.read_bytes()
        assert re.sub(r"-\d+$", "", Path(name).stem) == prompt, (
            "the rule by which VBench reads a prompt from a name"
        )
    lay_out(videos[:1], tmp_path / "out")
    assert [path.name for path in (tmp_path / "out" / "videos").iterdir()] == names[:1], (
        "videos of an earlier call would be measured too"
    )


@pytest.mark.parametrize("prompt", ["a/b", "..", "", "x" * 300])
def test_prompts_that_are_no_names(sampled: Path, tmp_path: Path, prompt: str) -> None:
    with refused("prompts"):
        lay_out([(sampled / "0000-x.mp4", prompt)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["film.mp4", "notes.txt", "Ein Ball-2-0.mp4"])
@pytest.mark.parametrize("prepared", [False, True])
def test_the_users_own_files_are_left_alone(sampled: Path, tmp_path: Path, name: str, prepared: bool) -> None:
    mine = tmp_path / "mine" / "videos"
    if prepared:  # by mhla, of another video; then the user puts a file beside it
        lay_out(sampled_videos(sampled)[:1], tmp_path / "mine")
    mine.mkdir(parents=True, exist_ok=True)
    (mine / name).write_text("mine")
    before = sorted(mine.iterdir())
    with refused("to") as error:
        lay_out(sampled_videos(sampled), tmp_path / "mine")
    assert name in str(error.value)
    assert sorted(mine.iterdir()) == before
    assert (mine / name).read_text() == "mine"


def test_a_list_of_ones_own_making_removes_nothing_elsewhere(sampled: Path, tmp_path: Path) -> None:
    lay_out(sampled_videos(sampled), tmp_path / "out")
    kept = tmp_path / "out" / "kept.mp4"
    kept.write_text("mine")
    listed = tmp_path / "out" / "prepared.json"
    listed.write_text(
        json.dumps({"videos": [*json.loads(listed.read_text())["videos"], "../kept.mp4", str(kept), 3]})
    )
    lay_out(sampled_videos(sampled), tmp_path / "out")
    assert kept.read_text() == "mine"
    listed.write_text("[1]")
    with refused("to") as error:
        lay_out(sampled_videos(sampled), tmp_path / "out")
    assert "prepared.json" in str(error.value)
    assert listed.read_text() == "[1]"


@pytest.mark.parametrize("inside", ["", "under", "videos", "results"])
def test_a_file_in_place_of_the_folder(
    sampled: Path, tmp_path: Path, inside: str, capsys: pytest.CaptureFixture[str]
) -> None:
    to = tmp_path / "taken"
    if inside in ("videos", "results"):
        to.mkdir()
        (to / inside).write_text("mine")
    else:
        to.write_text("mine")
        to = to / inside
    assert main(["eval", "vbench", str(sampled), "--prepare", "--to", str(to)]) == 2
    said = capsys.readouterr().err
    assert f"--to: {to}" in said
    assert said.count("\n") == 1


def test_a_folder_that_cannot_be_made(sampled: Path, tmp_path: Path) -> None:
    for to in (tmp_path / ("x" * 300), Path("/proc/vbench")):  # nobody, not even root, may make the second
        with refused("to") as error:
            lay_out(sampled_videos(sampled), to)
        assert str(to) in str(error.value)


@pytest.mark.parametrize("name", ["../secret.mp4", "/etc/passwd", "gone.mp4"])
def test_a_list_that_leaves_its_folder(sampled: Path, name: str) -> None:
    (sampled / "samples.json").write_text(json.dumps({"videos": [{"file": name, "prompt": "a"}]}))
    with refused(str(sampled / "samples.json")) as error:
        sampled_videos(sampled)
    assert name in str(error.value)


def test_a_folder_is_prepared(sampled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = tmp_path / "facts.json"
    assert main(["eval", "vbench", str(sampled), "--prepare", "--json", str(facts)]) == 0
    assert "3 videos of 2 prompts" in capsys.readouterr().out
    assert len(list((sampled / "vbench" / "videos").glob("*.mp4"))) == 3
    assert json.loads(facts.read_text())["summary"]["videos"] == 3


@without_vbench
def test_without_the_package_the_folder_is_prepared(
    sampled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert find_package() is None
    assert main(["eval", "vbench", str(sampled), "--to", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "--python: " in said
    assert "3 videos of 2 prompts" in said
    assert "pip install vbench" in said
    assert said.count("\n") == 1
    assert len(list((tmp_path / "out" / "videos").glob("*.mp4"))) == 3


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of a tiny text-to-video model."""
    root = tmp_path_factory.mktemp("trained")
    train(
        write_recipe(root / "tiny.yaml", write_clips(root)),
        "one",
        "--runs",
        str(root / "runs"),
        "--trainer.max_steps",
        "4",
    )
    return root / "runs" / "one"


@without_vbench
def test_a_run_is_sampled_with_prompts_of_the_users(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [
        "eval",
        "vbench",
        "one",
        "--runs",
        str(trained.parent),
        "--steps",
        "2",
        "--device",
        "cpu",
        "--prepare",
    ]
    assert main(asked) == 2
    assert "--prompts: " in capsys.readouterr().err
    (tmp_path / "p.txt").write_text("a bar moves right\na bar moves down\n")
    assert (
        main([*asked, "--prompts", str(tmp_path / "p.txt"), "--to", str(tmp_path / "out"), "--n", "2"]) == 0
    )
    wanted = [f"a bar moves {where}-{index}.mp4" for where in ("down", "right") for index in range(2)]
    assert sorted(path.name for path in (tmp_path / "out" / "videos").iterdir()) == wanted


@pytest.mark.parametrize(
    ("prompt", "extra", "says"),
    [
        ("a bar", ["--dimensions", "colour"], "did you mean 'color'"),
        ("a bar/a ball", [], "--prompts: 'a bar/a ball'"),
        ("a bar", ["--to", "FILE"], "--to: "),
        ("a bar", ["--to", "MINE"], "film.mp4"),
    ],
)
def test_a_wrong_command_is_refused_before_anything_is_drawn(
    trained: Path,
    tmp_path: Path,
    prompt: str,
    extra: list[str],
    says: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "p.txt").write_text(prompt)
    (tmp_path / "mine" / "videos").mkdir(parents=True)
    (tmp_path / "mine" / "videos" / "film.mp4").write_text("mine")
    places = {"FILE": str(tmp_path / "p.txt"), "MINE": str(tmp_path / "mine")}
    before = sorted(trained.rglob("*"))
    asked = [
        "eval",
        "vbench",
        str(trained),
        "--prompts",
        str(tmp_path / "p.txt"),
        "--n",
        "1",
        "--steps",
        "3",
        "--device",
        "cpu",
        "--prepare",
    ]
    assert main([*asked, *(places.get(word, word) for word in extra)]) == 2
    assert says in capsys.readouterr().err
    assert sorted(trained.rglob("*")) == before


@pytest.mark.parametrize(
    "option",
    [
        "--n 5",
        "--frames 8",
        "--size 16x16",
        "--rate 8",
        "--guidance 3",
        "--sampler euler",
        "--steps 3",
        "--seed 0",
        "--batch-size 1",
    ]
    + ["--processes 1", "--ckpt 4", "--no-ema", "--runs elsewhere"],
)
def test_drawing_options_are_refused_for_drawn_videos(
    sampled: Path, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", "vbench", str(sampled), "--prepare", *option.split()]) == 2
    said = capsys.readouterr().err
    assert f"{option.split()[0]}: " in said
    assert str(sampled) in said
    assert said.count("\n") == 1
    assert not (sampled / "vbench").exists()


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (["--python", "/no/such/python"], "--python: /no/such/python"),
        (["--python", "/bin/false"], "--python: /bin/false"),
        (["--dimensions", "colour"], "--dimensions: "),
        (["--prompts", "p.txt"], "--prompts: "),
    ],
)
def test_wrong_input(sampled: Path, extra: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "vbench", str(sampled), *extra]) == 2
    assert says in capsys.readouterr().err


def test_prompts_of_the_package_come_once(tmp_path: Path) -> None:
    entries = [
        {"prompt_en": "a", "dimension": ["color"]},
        {"prompt_en": "b", "dimension": ["scene"]},
        {"prompt_en": "a", "dimension": ["scene"]},
    ]
    (tmp_path / "VBench_full_info.json").write_text(json.dumps(entries))
    assert Package(sys.executable, tmp_path).prompts() == ["a", "b"]
    with refused(str(tmp_path / "gone")):
        Package(sys.executable, tmp_path / "gone").prompts()


def test_dimensions_of_other_prompts() -> None:
    check_dimensions(DIMENSIONS, standard=True)
    check_dimensions(ANY_PROMPT, standard=False)
    with refused("dimensions"):
        check_dimensions(["color"], standard=False)
