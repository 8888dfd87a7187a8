"""The folders that GenEval and DPG-Bench read, and the results that they write."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mhla_lightning.cli.main import main
from mhla_lightning.evaluation import dpg, geneval
from mhla_lightning.evaluation.sampled import prepare, sampled_files
from tests.helpers.errors import refused
from tests.helpers.sampled_images import SIDE, write_sampled
from tests.helpers.text_images import write_recipe

METADATA: list[dict[str, Any]] = [
    {"tag": "counting", "include": [{"class": "clock", "count": 2}], "prompt": "a photo of two clocks"},
    {"tag": "colors", "include": [{"class": "cat", "count": 1, "color": "red"}], "prompt": "a red cat"},
]
TEXTS = {"COCOval2014000000000042": "A cat sits.", "partiprompts7": "Two dogs\nrun, fast."}


@pytest.fixture
def metadata(tmp_path: Path) -> Path:
    file = tmp_path / "evaluation_metadata.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in METADATA))
    return file


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder like dpg_bench/prompts."""
    (tmp_path / "prompts").mkdir()
    for name, text in TEXTS.items():
        (tmp_path / "prompts" / f"{name}.txt").write_text(text)
    return tmp_path / "prompts"


def scorer_of_geneval(folder: Path) -> dict[str, tuple[dict[str, Any], list[bytes]]]:
    """What evaluate_images.py sees: its walk over the folder."""
    seen = {}
    for subfolder in os.listdir(folder):
        if not (folder / subfolder).is_dir() or not subfolder.isdigit():
            continue
        with open(folder / subfolder / "metadata.jsonl") as file:
            row = json.load(file)
        names = sorted(os.listdir(folder / subfolder / "samples"))
        assert all(re.match(r"\d+\.png", name) for name in names)
        seen[subfolder] = (row, [(folder / subfolder / "samples" / name).read_bytes() for name in names])
    return seen


def test_geneval_reads_the_prepared_folder(
    metadata: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = write_sampled(tmp_path / "drawn", [row["prompt"] for row in METADATA for _ in range(4)])
    given = ["eval", "geneval", str(tmp_path / "drawn"), "--metadata", str(metadata)]
    for _ in range(2):  # again over itself
        assert main([*given, "--json", str(tmp_path / "facts.json")]) == 0
    to = tmp_path / "drawn" / "geneval"
    contents = [file.read_bytes() for file in files]
    assert scorer_of_geneval(to / "images") == {
        "00000": (METADATA[0], contents[:4]),
        "00001": (METADATA[1], contents[4:]),
    }
    said = capsys.readouterr().out
    command = json.loads((tmp_path / "facts.json").read_text())["summary"]["command"]
    assert command in said
    assert command.split()[:3] == ["python", "evaluation/evaluate_images.py", str(to / "images")]
    assert "mmdet==2.27.0" in said
    assert "553 prompts" in said, "two prompts are not the benchmark"
    prepare(
        geneval.layout(geneval.read_metadata(metadata)[:1], sampled_files(files[0].parent, "images")[:4]), to
    )
    assert set(scorer_of_geneval(to / "images")) == {"00000"}, "an empty folder would stop the scorer"


def results_of_geneval(path: Path, correct: list[list[bool]]) -> Path:
    """Lines as pandas writes them for evaluate_images.py."""
    rows = [
        {
            "filename": f"images/{number:05d}/samples/{index:04d}.png",
            "tag": METADATA[number]["tag"],
            "prompt": METADATA[number]["prompt"],
            "correct": right,
            "reason": "" if right else "expected clock>=2, found 1",
            "metadata": json.dumps(METADATA[number]),
            "details": "{}",
        }
        for number, found in enumerate(correct)
        for index, right in enumerate(found)
    ]
    path.write_text("".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows))
    return path


def test_results_of_geneval_become_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = results_of_geneval(tmp_path / "results.jsonl", [[True, False, False, False], [True, True, True]])
    assert main(["eval", "geneval", str(file), "--json", str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert {key: value for key, value in found["rows"][0].items() if key != "results"} == pytest.approx(
        {"counting": 0.25, "colors": 1.0, "overall": 0.625, "correct_images": 4 / 7, "correct_prompts": 1.0}
    )
    assert found["summary"] == {"images": 7, "prompts": 2}
    shown = capsys.readouterr().out
    assert "0.6250" in shown
    assert "553" in shown
    for text, key in (("", str(file)), ('{"tag": "colors"}\n', f"{file}, line 1"), ("no json\n", str(file))):
        file.write_text(text)
        with refused(key):
            geneval.read_results(file)


@pytest.mark.parametrize("wrong", ["order", "one more", "none"])
def test_images_of_other_prompts_are_refused(metadata: Path, tmp_path: Path, wrong: str) -> None:
    prompts = [row["prompt"] for row in METADATA for _ in range(4)]
    changed = {"order": prompts[::-1], "one more": [*prompts, prompts[-1]], "none": ["x"]}[wrong]
    write_sampled(tmp_path / "drawn", changed)
    with refused("metadata"):
        geneval.layout(geneval.read_metadata(metadata), sampled_files(tmp_path / "drawn", "images"))


def test_prompts_of_another_kind_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    with refused(f"{tmp_path / 'p.jsonl'}, line 1"):
        geneval.read_metadata(tmp_path / "p.jsonl")
    with refused("prompts"):
        dpg.read_prompt_files(tmp_path)
    (tmp_path / "empty.txt").write_text(" \n")
    with refused(str(tmp_path / "empty.txt")):
        dpg.read_prompt_files(tmp_path)
    write_sampled(tmp_path / "drawn", ["a"])
    for benchmark, key in (("geneval", "--metadata: "), ("dpg", "--prompts: ")):
        assert main(["eval", benchmark, str(tmp_path / "drawn")]) == 2
        said = capsys.readouterr().err
        assert key in said
        assert "git clone https://github.com/" in said


def crops(grid: Path, side: int) -> list[np.ndarray]:
    """The four images that compute_dpg_bench.py cuts out, in its order."""
    with Image.open(grid) as image:
        corners = [(0, 0), (side, 0), (0, side), (side, side)]
        return [np.asarray(image.crop((x, y, x + side, y + side))) for x, y in corners]


def test_dpg_bench_cuts_the_prepared_grids(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = dpg.read_prompt_files(texts)
    assert prompts == {name: text.replace("\n", " ") for name, text in TEXTS.items()}
    files = write_sampled(tmp_path / "drawn", [text for text in prompts.values() for _ in range(4)])
    to = tmp_path / "to"
    given = ["eval", "dpg", str(tmp_path / "drawn"), "--prompts", str(texts), "--to", str(to)]
    assert main([*given, "--json", str(tmp_path / "facts.json")]) == 0
    assert sorted(os.listdir(to / "images")) == sorted(f"{name}.png" for name in TEXTS)
    for number, name in enumerate(prompts):
        for index, image in enumerate(crops(to / "images" / f"{name}.png", SIDE)):
            np.testing.assert_array_equal(image, np.asarray(Image.open(files[4 * number + index])))
    said = capsys.readouterr().out
    command = json.loads((tmp_path / "facts.json").read_text())["summary"]["command"]
    assert command in said
    assert f"--resolution {SIDE} --pic-num 4 --vqa-model mplug" in command
    assert str(to / "images") not in command.partition("--res-path")[2], "the scorer opens all files there"
    assert "1065 prompts" in said


def test_grids_are_of_square_images_of_one_size(texts: Path, tmp_path: Path) -> None:
    prompts = dpg.read_prompt_files(texts)
    write_sampled(tmp_path / "wide", [text for text in prompts.values() for _ in range(4)], (SIDE, 2 * SIDE))
    with refused("size"):
        dpg.layout(prompts, sampled_files(tmp_path / "wide", "images"))
    write_sampled(tmp_path / "few", list(prompts.values()))
    with refused("prompts"):
        dpg.layout(prompts, sampled_files(tmp_path / "few", "images"))


RESULTS = """\
to, here/images/partiprompts7.png, 1.0, 0.5, 0.5, 1.0, 0.75
to, here/images/COCOval2014000000000042.png, 0.0, 0.25, 0.5, 0.25, 0.25
Model: images
L1 category scores:
\tentity: 81.5
\tattribute: 60.25
L2 category scores:
\tattribute - color: 60.25
\tentity - whole: 81.5
Image path: to, here/images
Save results to: to, here/results.txt
DPG-Bench score: 50.0
"""


def test_results_of_dpg_bench_become_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "results.txt"
    file.write_text(RESULTS)
    assert main(["eval", "dpg", str(file), "--json", str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["rows"] == [{"results": str(file), "dpg": 50.0, "entity": 81.5, "attribute": 60.25}]
    assert found["summary"] == {"prompts": 2}
    assert "1065" in capsys.readouterr().out
    lines = RESULTS.splitlines(keepends=True)
    for wrong in ("", "".join(lines[:-1]), "".join(lines[1:]), "".join(lines[2:]), "nan\n" + RESULTS[-23:]):
        file.write_text(wrong)
        with refused(str(file)):
            dpg.read_results(file)


@pytest.mark.parametrize("name", ["film.png", "00000/notes.txt", "a.png"])
def test_the_users_own_files_are_left_alone(tmp_path: Path, name: str) -> None:
    mine = tmp_path / "to" / "images" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with refused("to") as error:
        prepare({"a.png": b"ours"}, tmp_path / "to")
    assert name in error.value.reason
    assert mine.read_text() == "mine"


def test_a_list_of_ones_own_making_removes_nothing_elsewhere(tmp_path: Path) -> None:
    prepare({"a/b.png": b"ours"}, tmp_path / "to")
    kept = tmp_path / "to" / "kept.png"
    kept.write_text("mine")
    listed = tmp_path / "to" / "prepared.json"
    listed.write_text(json.dumps({"files": ["a/b.png", "../kept.png", str(kept), 3]}))
    prepare({"c.png": b"new"}, tmp_path / "to")
    assert kept.read_text() == "mine"
    assert os.listdir(tmp_path / "to" / "images") == ["c.png"]
    listed.write_text("[1]")
    with refused("to"):
        prepare({"c.png": b"new"}, tmp_path / "to")
    with refused("to"):
        prepare({"c.png": b"new"}, tmp_path / "to" / "kept.png")


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "gone.png"])
def test_a_list_that_leaves_its_folder(tmp_path: Path, name: str) -> None:
    write_sampled(tmp_path / "drawn", ["a"])
    listed = tmp_path / "drawn" / "samples.json"
    listed.write_text(json.dumps({"images": [{"file": name, "prompt": "a"}]}))
    with refused(str(listed)):
        sampled_files(tmp_path / "drawn", "images")


@pytest.mark.slow  # trains a run with an autoencoder of diffusers
def test_runs_are_drawn_for_all_three(
    tmp_path: Path, metadata: Path, texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.helpers.sampled_images import save_clip

    recipe, runs = write_recipe(tmp_path / "recipe.yaml", tmp_path), str(tmp_path / "runs")
    assert main(["run", str(recipe), "--runs", runs, "--run-id", "bars", "--trainer.callbacks", "[]"]) == 0
    drawing = ["--runs", runs, "--steps", "2", "--device", "cpu"]
    given = ["eval", "geneval", "bars", "--metadata", str(metadata), *drawing]
    assert main([*given, "--to", str(tmp_path / "g")]) == 0
    seen = scorer_of_geneval(tmp_path / "g" / "images")
    assert [(row["prompt"], len(images)) for row, images in seen.values()] == [
        (row["prompt"], 4) for row in METADATA
    ]
    (folder,) = (tmp_path / "runs" / "bars" / "images").iterdir()
    parts = {path: path.stat().st_mtime_ns for path in (folder / "parts").iterdir()}
    assert main([*given, "--to", str(tmp_path / "again")]) == 0
    assert scorer_of_geneval(tmp_path / "again" / "images") == seen
    assert {path: path.stat().st_mtime_ns for path in (folder / "parts").iterdir()} == parts, "drawn anew"
    assert main(["eval", "dpg", "bars", "--prompts", str(texts), *drawing, "--to", str(tmp_path / "d")]) == 0
    assert len(crops(tmp_path / "d" / "images" / "partiprompts7.png", 32)) == 4
    assert main(["eval", "dpg", "bars", "--prompts", str(texts), "--size", "32x64", *drawing]) == 2
    assert "--size: 32x64" in capsys.readouterr().err
    clip, prompts = save_clip(tmp_path / "clip"), tmp_path / "p.txt"
    prompts.write_text("a bar\na cat\n")
    given = ["eval", "clip", "bars", "--prompts", str(prompts), "--clip", clip, *drawing]
    assert main([*given, "--json", str(tmp_path / "one.json")]) == 0
    assert main([*given, "--json", str(tmp_path / "two.json")]) == 0
    assert "measured before" in capsys.readouterr().out
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert one == two
    evaluation = f"clip: {{clip: {clip}, prompts: {prompts}, steps: 2, device: cpu}}"
    compare = [
        "compare",
        str(recipe),
        "--over",
        "model.attention=[linear]",
        "--runs",
        runs,
        "--eval",
        evaluation,
    ]
    assert main([*compare, "--trainer.callbacks", "[]", "--json", str(tmp_path / "table.json")]) == 0
    (row,) = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert 0 <= row["mean"]["clip/clip_score"] <= 100
