"""`mhla sample` of videos: readable files, equal bits by any processes, wrong input."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mhla_lightning.cli.main import main
from mhla_lightning.data.index import TextEncoding
from mhla_lightning.diffusion import Guidance
from mhla_lightning.errors import UserError
from mhla_lightning.inference.diffusion.prompts import Prompt, TextCache, read_prompts
from mhla_lightning.inference.diffusion.video_files import (
    animated_gif,
    prompt_slug,
    read_frames,
    thumbnails,
    video_sheet,
    write_mp4,
)
from mhla_lightning.inference.diffusion.videos import (
    Size,
    VideoDrawing,
    draw_videos_of,
    find_video_run,
    load_video_task,
    training_size,
)
from tests.helpers.diffusion_models import train
from tests.helpers.ranks import Nursery
from tests.helpers.video_runs import CAPTIONS, FRAMES, RATE, SIDE, write_clips, write_recipe


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run with averaged weights."""
    root = tmp_path_factory.mktemp("videos")
    train(write_recipe(root / "tiny.yaml", write_clips(root)), "one", "--runs", str(root / "runs"))
    return root / "runs" / "one"


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """A file of three prompts, an empty line among them."""
    path = tmp_path / "prompts.txt"
    path.write_text(f"{CAPTIONS[0]}\n\n{CAPTIONS[1]}\na bar/../stands\n")
    return path


def command(trained: Path, prompts: Path, out: Path, *extra: str) -> list[str]:
    return [
        "sample",
        str(trained),
        "--prompts",
        str(prompts),
        "--steps",
        "3",
        "--out",
        str(out),
        "--device",
        "cpu",
        *extra,
    ]


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.mp4"))}


def moving(frames: int, height: int, width: int) -> np.ndarray:
    """Smooth colours that move, uint8 (frames, height, width, 3)."""
    t, y, x = np.mgrid[:frames, :height, :width]
    return np.stack(
        [120 + 100 * np.sin((x + 2 * t) / 9), 120 + 100 * np.cos((y + t) / 7), np.full(t.shape, 90)], -1
    ).astype(np.uint8)


def test_a_file_each_a_sheet_and_a_list(
    trained: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import av

    out = tmp_path / "out"
    assert (
        main(
            [
                *command(trained, prompts, out, "--n", "2", "--prompt", ""),
                "--json",
                str(tmp_path / "facts.json"),
            ]
        )
        == 0
    )
    listed = json.loads((out / "samples.json").read_text())
    assert [entry["prompt"] for entry in listed["videos"]] == [
        text for text in (*CAPTIONS, "a bar/../stands", "") for _ in range(2)
    ]
    assert [entry["file"] for entry in listed["videos"]] == list(contents(out))
    assert list(contents(out))[4:7] == ["0004-a-bar-stands.mp4", "0005-a-bar-stands.mp4", "0006-empty.mp4"]
    for name in contents(out):
        assert np.stack(list(read_frames(out / name))).shape == (FRAMES, SIDE, SIDE, 3)
        with av.open(str(out / name)) as container:
            assert float(container.streams.video[0].average_rate or 0) == RATE
            assert container.streams.video[0].codec_context.name == "h264"
    with Image.open(out / "sheet.png") as sheet:
        assert sheet.width > 8 * 9 * SIDE, "eight frames over time, enlarged"
        assert sheet.height > 8 * 9 * SIDE, "eight videos"
    assert json.loads((tmp_path / "facts.json").read_text())["videos"] == 8
    assert "8 videos of one step-00000004 (averaged weights)" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_draw_the_same_bits(trained: Path, prompts: Path, tmp_path: Path) -> None:
    for processes in ("1", "2"):
        assert (
            main(
                command(trained, prompts, tmp_path / processes, "--processes", processes, "--batch-size", "2")
            )
            == 0
        )
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    assert (tmp_path / "1" / "sheet.png").read_bytes() == (tmp_path / "2" / "sheet.png").read_bytes()


def test_a_video_is_the_same_in_any_batch_and_follows_its_prompt(trained: Path) -> None:
    found = find_video_run(str(trained))
    task, drawing = (
        load_video_task(found, "cpu"),
        VideoDrawing(training_size(found), 3, "euler", 4, Guidance(2.0)),
    )
    texts, null = found.data.encode_text([*CAPTIONS, CAPTIONS[0]]), found.data.null_text()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    whole = draw_videos_of(found, task, texts, null, range(3), drawing).astype(int)
    assert torch.equal(torch.get_rng_state(), before), "no generator of the process is used"
    alone = draw_videos_of(found, task, texts[1:2], null, range(1, 2), drawing)[0]
    assert np.abs(alone - whole[1]).max() <= 1
    assert np.abs(whole[0] - whole[2]).mean() > 1, "the same prompt twice, with other noise"
    far = replace(drawing, guidance=Guidance(5000.0))  # four steps of training tell prompts little apart
    one, other = (
        draw_videos_of(found, task, texts[n : n + 1], null, range(1, 2), far).astype(int) for n in range(2)
    )
    assert np.abs(one - other).max() > 10, "another prompt on the same noise"


@pytest.mark.slow
def test_a_killed_job_continues(trained: Path, prompts: Path, tmp_path: Path, nursery: Nursery) -> None:
    slow = ["--steps", "40", "--n", "3"]
    started = nursery.start(1, command(trained, prompts, tmp_path / "cut", *slow), tmp_path)
    started.kill_when(lambda: len(list((tmp_path / "cut").glob("parts/0*.npy"))) >= 2)
    left = {path.stem: os.stat(path).st_mtime_ns for path in (tmp_path / "cut" / "parts").glob("0*.npy")}
    assert 2 <= len(left) < 9
    for name in ("cut", "whole"):
        assert main(command(trained, prompts, tmp_path / name, *slow)) == 0
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    kept = {path.stem: os.stat(path).st_mtime_ns for path in (tmp_path / "cut" / "parts").glob("0*.npy")}
    assert kept.items() >= left.items(), "what was drawn before is not drawn again"


def test_a_lost_video_is_drawn_again_and_needs_no_encoder(
    trained: Path, prompts: Path, tmp_path: Path
) -> None:
    assert main(command(trained, prompts, tmp_path / "out")) == 0
    before = contents(tmp_path / "out")
    kept = {path: os.stat(path).st_mtime_ns for path in (tmp_path / "out" / "text").iterdir()}
    assert len(kept) == 4, "three prompts and the empty one"
    (tmp_path / "out" / "0001-a-bar-moves-down.mp4").unlink()
    assert main(command(trained, prompts, tmp_path / "out")) == 0
    assert contents(tmp_path / "out") == before
    assert {path: os.stat(path).st_mtime_ns for path in (tmp_path / "out" / "text").iterdir()} == kept


def test_kept_features_are_read_without_their_encoder(tmp_path: Path) -> None:
    given = [Prompt("A red  ball", "--prompt"), Prompt("", "--prompt")]
    cache = TextCache(tmp_path / "text", TextEncoding("words:8", 6, 8))
    cache.keep(cache.encode(given, torch.device("cpu")))
    gone = TextCache(tmp_path / "text", TextEncoding("/nowhere/umt5", 6, 8))
    gone.folder = tmp_path / "gone"
    gone.folder.mkdir()
    for prompt in given:
        cache.file(prompt.text).rename(gone.file(prompt.text))
    assert gone.encode(given, torch.device("cpu")) == {}
    kept = gone.read(["A red  ball", ""])
    assert kept.shape == (2, 6, 8)
    assert (kept[0, :3] != 0).all()
    assert not kept[0, 3:].any()
    with pytest.raises(UserError, match="/nowhere/umt5"):  # the encoder that is not there
        gone.encode([Prompt("a blue ball", "--prompt")], torch.device("cpu"))


@pytest.mark.parametrize(
    ("extra", "shape"),
    [(["--frames", "4"], (4, 16, 16)), (["--size", "24x32", "--sampler", "euler"], (8, 24, 32))],
)
def test_other_lengths_and_sizes_than_those_of_training(
    trained: Path, prompts: Path, tmp_path: Path, extra: list[str], shape: tuple[int, ...]
) -> None:
    assert main(command(trained, prompts, tmp_path / "out", *extra, "--rate", "24")) == 0
    assert np.stack(list(read_frames(next((tmp_path / "out").glob("*.mp4"))))).shape == (*shape, 3)


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (["--frames", "7"], "7 frames of 16x16"),
        (["--frames", "7"], "--frames 6 --size 16x16"),
        (["--size", "18x21"], "--frames 8 --size 16x20"),
        (["--size", "16"], "--size: 16 "),
        (["--size", "0x16"], "--size: 0x16 "),
        (["--frames", "0"], "--frames: 0"),
        (["--n", "0"], "--n: 0"),
        (["--rate", "0"], "--rate: 0"),
        (["--size", "40000x40000"], "8 frames of 40000x40000: they take at least"),
        (
            ["--size", "40000x40000", "--batch-size", "2"],
            "8 frames of 40000x40000, 2 at once: they take at least",
        ),
        (["--frames", "400000000"], "--frames: 400000000"),
        (["--sampler", "ddpm"], "dpm++, euler"),
        (["--steps", "1001"], "1001"),
        (["--guidance", "-1"], "-1"),
        (["--ckpt", "3"], "--ckpt: 3"),
        (["--classes", "0"], "--classes: "),
        (["--guidance-channels", "3"], "--guidance-channels: "),
        (["--prompt", "one two three four five six seven"], "--prompt: "),
    ],
)
def test_wrong_input(
    trained: Path,
    prompts: Path,
    tmp_path: Path,
    extra: list[str],
    says: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(command(trained, prompts, tmp_path / "out", *extra)) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_suggested_size_works(trained: Path, prompts: Path, tmp_path: Path) -> None:
    assert main(command(trained, prompts, tmp_path / "out", "--frames", "6", "--size", "16x20")) == 0


def test_prompts_of_an_image_run_are_refused(
    shards: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.helpers.diffusion_models import write_recipe as write_image_recipe

    train(
        write_image_recipe(tmp_path / "image.yaml", shards),
        "pictures",
        "--runs",
        str(tmp_path / "runs"),
        "--trainer.max_steps",
        "4",
    )
    assert main(command(tmp_path / "runs" / "pictures", prompts, tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert "--prompts: " in error
    assert "pictures" in error


def test_a_folder_of_other_videos_is_kept(
    trained: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(trained, prompts, tmp_path / "out")) == 0
    before = contents(tmp_path / "out")
    assert main(command(trained, prompts, tmp_path / "out", "--prompt", "another")) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'out'}: " in error
    assert "(prompts)" in error
    assert contents(tmp_path / "out") == before


def test_no_prompt(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", str(trained)]) == 2
    error = capsys.readouterr().err
    assert "--prompts: " in error
    assert "--prompt;" in error or error.endswith("--prompt\n")


def test_prompts_of_both_kinds_of_file(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("\ufeffone\n\n  two words \n", encoding="utf-8")
    (tmp_path / "p.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two words", "seed": 3}\n')
    for name, lines in (("p.txt", (1, 3)), ("p.jsonl", (1, 2))):
        path = tmp_path / name
        assert read_prompts(path) == [
            Prompt("one", f"{path}, line {lines[0]}"),
            Prompt("two words", f"{path}, line {lines[1]}"),
        ]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("p.jsonl", b'{"prompt": "a"}\n{"text": "b"}\n', "p.jsonl, line 2: "),
        ("p.jsonl", b"a ball\n", "p.jsonl, line 1: "),
        ("p.jsonl", b"[1]\n", "p.jsonl, line 1: "),
        ("p.txt", b"\n \n", "p.txt: "),
        ("p.txt", b"\xff\xfe\x00", "p.txt: "),
        ("p.txt", None, "p.txt: "),
        ("p.txt", b"short\none two three four five six seven\n", "p.txt, line 2: "),
    ],
)
def test_wrong_prompt_files(
    trained: Path,
    tmp_path: Path,
    name: str,
    text: bytes | None,
    says: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if text is not None:
        (tmp_path / name).write_bytes(text)
    assert main(command(trained, tmp_path / name, tmp_path / "out")) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", [(16, 16), (33, 50), (48, 65), (240, 400)])
def test_an_mp4_gives_its_frames_back_and_has_always_the_same_bytes(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    frames = moving(12, *size)
    for number in range(4):
        write_mp4(tmp_path / f"{number}.mp4", frames, 24000 / 1001)
    back = np.stack(list(read_frames(tmp_path / "0.mp4")))
    assert back.shape == (12, size[0] + size[0] % 2, size[1] + size[1] % 2, 3)
    assert np.abs(back[:, : size[0], : size[1]].astype(int) - frames).mean() < 4
    assert len({(tmp_path / f"{number}.mp4").read_bytes() for number in range(4)}) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{number}.mp4" for number in range(4)], (
        "nothing half written is left"
    )


def test_thumbnails_are_spread_over_time() -> None:
    frames = np.arange(81, dtype=np.uint8)[:, None, None, None] * np.ones((1, 480, 800, 3), np.uint8)
    small = thumbnails(frames)
    assert small.shape == (8, 96, 160, 3)
    assert small[:, 0, 0, 0].tolist() == [0, 11, 23, 34, 46, 57, 69, 80]
    assert len(thumbnails(frames[:3])) == 3


def test_a_contact_sheet_shows_frames_side_by_side_under_their_caption() -> None:
    rows = [thumbnails(moving(8, 16, 16)), thumbnails(moving(8, 16, 16)[::-1])]
    sheet = np.asarray(video_sheet(rows, ["a ball", "many words " * 100]))
    side = rows[0].shape[1]
    places = [
        (y, x)
        for y in range(sheet.shape[0] - side + 1)
        for x in (4, 4 + side + 4)
        if np.array_equal(sheet[y : y + side, x : x + side], rows[0][0])
    ]
    assert len(places) == 1, "the first frame stands there once"
    top, left = places[0]
    assert np.array_equal(sheet[top : top + side, left + side + 4 : left + 2 * side + 4], rows[0][1])
    assert (sheet[:top] < 100).any(), "the caption's letters"
    assert (sheet[:, -4:] == 255).all(), "a long caption is cut"


def test_animated_gif_has_all_frames(tmp_path: Path) -> None:
    (tmp_path / "a.gif").write_bytes(animated_gif(moving(9, 24, 32), 10))
    with Image.open(tmp_path / "a.gif") as picture:
        assert picture.n_frames == 9  # type: ignore[attr-defined]
        assert picture.size == (32, 24)
        assert picture.info["duration"] == 100


def test_slugs() -> None:
    assert prompt_slug("A Café — über/../etc") == "a-cafe-uber-etc"
    assert prompt_slug("玉") == "empty"
    assert len(prompt_slug("word " * 40)) <= 40


def test_training_size_of_pixels(trained: Path) -> None:
    assert training_size(find_video_run(str(trained))) == Size(FRAMES, SIDE, SIDE)
