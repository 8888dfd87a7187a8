"""`mhla data clips`: which frames of real videos stand in which clips, whoever cuts them and however often
it is interrupted.
"""

from __future__ import annotations

import json
import struct
from bisect import bisect_right
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mhla_lightning.cli.main import main
from mhla_lightning.data.encoders.videos import decode_mp4
from mhla_lightning.data.index import Clip, read_index
from mhla_lightning.data.prepare.clips.frames import fit, read_clips
from mhla_lightning.data.prepare.clips.layout import nearest, place, split_in_time
from mhla_lightning.data.prepare.clips.make import make_clips
from mhla_lightning.data.prepare.clips.options import ClipOptions
from mhla_lightning.data.prepare.clips.probing import watch
from mhla_lightning.data.prepare.verify import verify
from tests.helpers.ranks import Nursery
from tests.helpers.shards import array, content, samples

pytest.importorskip("av")
from tests.helpers.videos import greys, numbers, save_videos, write_video  # noqa: E402  needs PyAV

SMALL = Clip(4, 16, 24, 5.0)


def options(clip: Clip = SMALL, **others: Any) -> ClipOptions:
    return ClipOptions(**({"clips": (clip,), "val": 0.3, "val_by": "time"} | others))  # type: ignore[arg-type]


# Frames by time


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm", ".gif"])
def test_frames_come_at_a_constant_rate(tmp_path: Path, suffix: str) -> None:
    save_videos(tmp_path / "in", 2, frames=30, suffix=suffix)
    report = make_clips(
        tmp_path / "in", tmp_path / "out", options()
    )  # every second of 3 s at 10 a second: 15 frames, of which 5 are held out
    train, val = samples(tmp_path / "out/train"), samples(tmp_path / "out/val")
    by_film: dict[bytes, list[list[int]]] = {}
    for sample in train:
        by_film.setdefault(sample["txt"], []).append(numbers(array(sample, "clip")))
    assert by_film == {f"grey film number {n}".encode(): [[0, 2, 4, 6], [8, 10, 12, 14]] for n in range(2)}
    assert [numbers(array(sample, "clip")) for sample in val] == [[21, 23, 25, 27]] * 2
    assert report.seconds == {"train": 4 * 0.8, "val": 2 * 0.8}
    assert read_index(tmp_path / "out/val").clip == SMALL
    assert verify(str(tmp_path / "out")).found == 0


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".gif"])
def test_variable_rates_are_followed_by_time(tmp_path: Path, suffix: str) -> None:
    rng = np.random.default_rng(0)
    times = np.cumsum([0.0, *rng.choice([0.04, 0.1, 0.25, 0.5], 29)]).round(2).tolist()
    path = write_video(tmp_path / f"film{suffix}", greys(30), times=times)
    film = watch(path)
    found, end = film.times, film.end
    np.testing.assert_allclose(found - found[0], times, atol=1e-3)
    clip = Clip(8, 16, 16, 12.5)
    starts = place([(float(found[0]), end)], clip, 0.3)
    assert len(starts) > 10
    for start, frames in zip(starts, read_clips(path, starts, clip, float(found[-1])), strict=True):
        shown = [start - found[0] + number / clip.rate for number in range(clip.frames)]
        assert numbers(frames) == [bisect_right(times, moment + 2e-3) - 1 for moment in shown]


def test_far_in_a_video_is_what_is_read_from_its_begin(tmp_path: Path) -> None:
    path = write_video(tmp_path / "film.mp4", greys(36), rate=2, key_every=8)
    film = watch(path)
    times, end = film.times, film.end
    clip = Clip(3, 16, 16, 2.0)
    starts = place([(0.0, end)], clip, 0.5)
    whole = list(read_clips(path, starts, clip, float(times[-1])))
    assert numbers(whole[30]) == [30, 31, 32]
    for number in (21, 25, 30, 33):  # from 10 s on by the key frame before
        (alone,) = read_clips(path, [starts[number]], clip, float(times[-1]))
        assert np.array_equal(alone, whole[number])


def test_phones_turn_their_pictures(tmp_path: Path) -> None:
    picture = np.zeros((32, 64, 3), np.uint8)
    picture[:, :32] = 255
    path = write_video(tmp_path / "film.mp4", [picture] * 10)
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40
    data[matrix : matrix + 36] = struct.pack(
        ">9i", 0, 65536, 0, -65536, 0, 0, 0, 0, 2**30
    )  # shown turned clockwise: what is left goes up
    path.write_bytes(data)
    film = watch(path)
    assert film.aspect == 0.5
    (clip,) = read_clips(path, [0.0], Clip(2, 40, 20, 5.0), float(film.times[-1]))
    assert clip[0, :15].min() > 240
    assert clip[0, 25:].max() < 15


def test_fit_keeps_the_middle_and_its_shape() -> None:
    picture = np.zeros((40, 80, 3), np.uint8)
    picture[:, 20:60] = 200
    assert (fit(picture, 2.0, 10, 10)[:, 2:-2] == 200).all(), "the sides are cut off"
    assert (fit(picture.transpose(1, 0, 2), 0.5, 10, 10)[2:-2] == 200).all(), "top and bottom are cut off"
    squeezed = fit(picture, 4.0, 10, 40)  # pixels twice as wide as high: nothing is cut off
    assert (squeezed[:, :8] == 0).all()
    assert (squeezed[:, 12:28] == 200).all()
    rows = np.repeat(np.arange(64) % 2 * 255, 64).reshape(64, 64, 1).repeat(3, axis=2).astype(np.uint8)
    assert np.abs(fit(rows, 1.0, 8, 8).astype(int) - 127)[1:-1].max() < 20, (
        "single lines are smoothed, not picked"
    )


# Which stretches


def test_overlapping_clips(tmp_path: Path) -> None:
    save_videos(tmp_path / "in", 1, frames=30)
    make_clips(tmp_path / "in", tmp_path / "out", options(stride=1, val=0.4))
    assert [numbers(array(sample, "clip")) for sample in samples(tmp_path / "out/train")] == [
        [n, n + 2, n + 4, n + 6] for n in (0, 2, 4, 6, 8, 10)
    ]


@pytest.mark.parametrize("val_by", ["time", "video"])
@pytest.mark.parametrize("stride", [None, 0.5, 3])
def test_no_frame_is_in_train_and_val(tmp_path: Path, val_by: str, stride: float | None) -> None:
    save_videos(tmp_path / "in", 4, frames=23)
    report = make_clips(tmp_path / "in", tmp_path / "out", options(stride=stride, val_by=val_by, val=0.25))
    seen = {
        split: {(s["txt"], n) for s in samples(tmp_path / "out" / split) for n in numbers(array(s, "clip"))}
        for split in report.indices
    }
    assert seen["train"]
    assert seen["val"]
    assert not seen["train"] & seen["val"]
    films = {split: {film for film, _ in found} for split, found in seen.items()}
    if val_by == "video":
        assert (len(films["val"]), len(films["train"])) == (1, 3)
        assert not films["train"] & films["val"]
    else:
        assert films["train"] == films["val"], "the end of each"
        assert min(n for _, n in seen["val"]) > max(n for _, n in seen["train"])


def test_the_end_that_is_held_out_has_room_for_a_clip() -> None:
    times = np.arange(100) / 25
    clip = Clip(16, 8, 8, 12.0)
    train, val = split_in_time([(0.0, 4.0)], times, clip, 0.1)
    assert train[-1][1] == val[0][0]
    assert val[-1][1] == 4.0
    assert len(place(val, clip, 1 / 12)) == 1
    assert split_in_time([(0.0, 1.6)], times[:40], clip, 0.5) == ([(0.0, 1.6)], []), (
        "one clip alone is trained on"
    )
    train, val = split_in_time(
        [(0.0, 2.0), (2.0, 3.6), (3.6, 4.0)], times, clip, 0.2
    )  # the last shot is too short
    assert place(val, clip, 1 / 12)[0] >= 2.0
    assert len(place(train, clip, 1 / 12)) > 5


def test_no_clip_crosses_a_cut(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    scenes = [rng.integers(0, 256, (4, 6, 3)).repeat(8, 0).repeat(8, 1) for _ in range(3)]
    film = [
        np.clip(scene + 2 * shade, 0, 255).astype(np.uint8)
        for scene, length in zip(scenes, (12, 5, 13), strict=True)
        for shade in range(length)
    ]
    write_video(tmp_path / "in/film.mp4", film)
    make_clips(tmp_path / "in", tmp_path / "cut", options(shots=True, stride=1), need_captions=False)
    make_clips(tmp_path / "in", tmp_path / "whole", options(stride=1), need_captions=False)

    def crossing(folder: Path) -> list[bool]:
        clips = [
            array(sample, "clip").astype(int)
            for split in ("train", "val")
            for sample in samples(folder / split)
        ]
        return [np.abs(np.diff(clip, axis=0)).mean(axis=(1, 2, 3)).max() > 25 for clip in clips]

    assert any(crossing(tmp_path / "whole"))
    assert len(crossing(tmp_path / "cut")) >= 4
    assert not any(crossing(tmp_path / "cut"))


def test_buckets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"wide": (32, 64), "high": (64, 32), "short": (32, 64)}
    for name, size in sizes.items():
        for number in range(2):
            write_video(tmp_path / "in" / f"{name}{number}.mp4", greys(3 if name == "short" else 20, size))
    out = tmp_path / "out"
    buckets = ["--bucket", "4x16x32", "--bucket", "4x32x16", "--bucket", "1x32x16", "--bucket", "9x30x31"]
    command = [
        "data",
        "clips",
        str(tmp_path / "in"),
        "--to",
        str(out),
        "--rate",
        "5",
        *buckets,
        "--val",
        "0.5",
        "--no-captions",
        "--workers",
        "1",
    ]
    assert main(command) == 0
    names = {
        folder: {sample["__key__"].split("-")[1][:-1] for sample in samples(out / folder)}
        for folder in ("4x16x32/train", "4x32x16/val")
    }
    assert names == {"4x16x32/train": {"wide"}, "4x32x16/val": {"high"}}
    assert {sample["__key__"].split("-")[1][:-1] for sample in samples(out / "1x32x16/train")} == {"short"}, (
        "too short for four frames"
    )
    assert read_index(out / "1x32x16/train").clip == Clip(1, 32, 16, 5.0)
    assert "9x30x31: no clips, since other buckets are nearer to every video" in capsys.readouterr().out
    assert main([*command, "--overwrite"]) == 0
    assert (
        nearest(1.0, [(0.0, 9.0)], [Clip(4, 16, 32, 5.0), Clip(4, 32, 30, 5.0), Clip(8, 32, 30, 5.0)]) == 2
    ), "of equals the longest"


def test_captions_of_json_lines(tmp_path: Path) -> None:
    save_videos(tmp_path / "in" / "deep", 2)
    lines = [
        {"file": "deep/video0.mp4", "caption": "one\u2028line"},
        {"file": "video1.mp4", "caption": "schön"},
        {"file": "elsewhere.mp4", "caption": "?"},
    ]
    (tmp_path / "told.jsonl").write_text(
        "\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n"
    )
    make_clips(tmp_path / "in", tmp_path / "out", options(), captions=tmp_path / "told.jsonl")
    assert {sample["txt"].decode() for sample in samples(tmp_path / "out/train")} == {
        "one\u2028line",
        "schön",
    }


def test_mp4_members_hold_nearly_the_same_pixels(tmp_path: Path) -> None:
    save_videos(tmp_path / "in", 2)
    make_clips(tmp_path / "in", tmp_path / "npy", options(store="npy"))
    make_clips(tmp_path / "in", tmp_path / "mp4", options(store="mp4"))
    pairs = list(zip(samples(tmp_path / "npy/train"), samples(tmp_path / "mp4/train"), strict=True))
    for exact, lossy in pairs:
        assert (exact["__key__"], exact["txt"]) == (lossy["__key__"], lossy["txt"])
        assert np.abs(decode_mp4(lossy["mp4"], SMALL, "it").astype(int) - array(exact, "clip")).max() <= 4
    assert verify(str(tmp_path / "mp4")).found == 0


# The same bytes


@pytest.mark.slow  # two processes start; test_pack.py has such a pair in `make test`
@pytest.mark.parametrize("store", ["npy", "mp4"])
def test_processes_do_not_change_the_bytes(tmp_path: Path, store: str) -> None:
    save_videos(tmp_path / "in", 3)
    for workers in (1, 2):
        make_clips(
            tmp_path / "in",
            tmp_path / str(workers),
            options(stride=2, shots=True, store=store),
            workers=workers,
        )
    assert content(tmp_path / "1") == content(tmp_path / "2")


@pytest.mark.slow
def test_killed_and_run_again(tmp_path: Path, nursery: Nursery) -> None:
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, (160, 160, 3), dtype=np.uint8) for _ in range(40)]
    for number in range(3):
        write_video(tmp_path / "in" / f"noise{number}.mp4", noise)
    arguments = [
        "data",
        "clips",
        str(tmp_path / "in"),
        "--frames",
        "8",
        "--size",
        "128",
        "--rate",
        "10",
        "--stride",
        "1",
        "--no-captions",
    ]
    arguments += ["--val-by", "time", "--store", "mp4", "--workers", "2", "--to"]
    entries = tmp_path / ".killed.packing/entries/train"
    nursery.start(1, [*arguments, str(tmp_path / "killed")], tmp_path).kill_when(
        lambda: len(list(entries.glob("*.json"))) >= 2
    )
    finished = sorted(entries.glob("*.json"))
    assert len(finished) >= 2
    assert not (tmp_path / "killed").exists(), "it was killed in the middle"
    notes: list[str] = []
    settings = ClipOptions((Clip(8, 128, 128, 10.0),), stride=1.0, val_by="time", store="mp4")
    make_clips(tmp_path / "in", tmp_path / "killed", settings, need_captions=False, on_note=notes.append)
    assert any("were finished before and are kept" in note for note in notes)
    make_clips(tmp_path / "in", tmp_path / "whole", settings, need_captions=False)
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
