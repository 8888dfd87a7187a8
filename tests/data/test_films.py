"""Films as FFmpeg plays them: which stream, which frames, when, which way up, in which colours.

What is right comes from FFmpeg's own filters and decoders, or from the levels that were written.
"""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mhla_lightning.data import ClipDataModule
from mhla_lightning.data.encoders.videos import decode_mp4, measure_mp4, open_video, shown, thumbnail, upright
from mhla_lightning.data.index import Clip, TextEncoding, read_index
from mhla_lightning.data.modules.options import ClipConfig
from mhla_lightning.data.prepare.clips.frames import read_clips
from mhla_lightning.data.prepare.clips.make import make_clips
from mhla_lightning.data.prepare.clips.options import ClipOptions
from mhla_lightning.data.prepare.clips.probing import watch
from mhla_lightning.data.split import Split
from mhla_lightning.data.stores import LocalStore
from mhla_lightning.errors import DataError
from tests.helpers.data_modules import build
from tests.helpers.errors import refused

av = pytest.importorskip("av")
from tests.helpers.videos import STEP, Parcel, greys, numbers, repack, write_video  # noqa: E402  needs PyAV

H264, LOSSLESS = ("libx264", "yuv420p", {"crf": "4"}), ("ffv1", "bgr0", dict[str, str]())
QUARTERS = np.zeros((32, 48, 3), np.uint8)  # red green / blue yellow
QUARTERS[:16, :24], QUARTERS[:16, 24:] = (220, 0, 0), (0, 220, 0)
QUARTERS[16:, :24], QUARTERS[16:, 24:] = (0, 0, 220), (220, 220, 0)


def pictures(path: Path, cut: float | None = None) -> np.ndarray:
    """What is shown at the time of every frame, (frames, 16, 24, 3)."""
    film = watch(path, cut)
    one = Clip(1, 16, 24, 10.0)
    clips = read_clips(path, film.times.tolist(), one, float(film.times[-1]), film.seekable)
    return np.concatenate(list(clips))


def seen(path: Path, cut: float | None = None) -> list[int]:
    """The number of the grey picture that is shown at the time of every frame."""
    return numbers(pictures(path, cut))


def levels(frames: np.ndarray | list[np.ndarray]) -> list[int]:
    """The nearest numbers of greys; the codec may be coarse."""
    return [round((float(frame.mean()) - 20) / STEP) for frame in frames]


def decoded(path: Path) -> list[np.ndarray]:
    """The pictures of a film in the order in which FFmpeg gives them."""
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def first_picture(path: Path) -> np.ndarray:
    with open_video(path, str(path)) as (container, stream):
        return upright(next(shown(container, stream, str(path))).frame, str(path))


def by_filters(path: Path, *filters: tuple[str, str]) -> np.ndarray:
    """The first picture by FFmpeg's filters."""
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        graph = av.filter.Graph()
        chain = [graph.add_buffer(template=stream)]
        chain += [graph.add(name, value) for name, value in (*filters, ("format", "rgb24"))]
        chain.append(graph.add("buffersink"))
        for before, after in zip(chain, chain[1:], strict=False):
            before.link_to(after)
        graph.configure()
        graph.push(next(container.decode(stream)))
        return np.asarray(graph.pull().to_ndarray())


# Which stream


def _box(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", 8 + len(body)) + kind + body


def _jpeg(picture: np.ndarray, orientation: int | None = None) -> bytes:
    image, file = Image.fromarray(picture), io.BytesIO()
    exif = image.getexif()
    if orientation is not None:
        exif[0x0112] = orientation
    image.save(file, "JPEG", quality=95, exif=exif)
    return file.getvalue()


def _cover_box(path: Path) -> None:
    """As taggers and drones write it: before the tracks, so that FFmpeg counts it as stream 0."""
    data = write_video(path, greys(20)).read_bytes()
    cover = _box(b"covr", _box(b"data", struct.pack(">II", 13, 0) + _jpeg(QUARTERS)))
    handler = _box(b"hdlr", bytes(8) + b"mdirappl" + bytes(9))
    added = _box(b"udta", _box(b"meta", bytes(4) + handler + _box(b"ilst", cover)))
    at = data.index(b"moov") - 4
    (size,) = struct.unpack(">I", data[at : at + 4])
    path.write_bytes(data[:at] + _box(b"moov", added + data[at + 8 : at + size]) + data[at + size :])


def _beside(path: Path, size: tuple[int, int], pictures: int, codec: tuple[str, str], default: bool) -> None:
    """A stream of dark pictures before the film."""
    with av.open(str(path), "w") as file:
        streams = [file.add_stream(codec[0], rate=10), file.add_stream("libx264", rate=10)]
        frames = [[np.full((*size, 3), 2, np.uint8)] * pictures, greys(20)]
        for stream, film, pixels in zip(streams, frames, (codec[1], "yuv420p"), strict=True):
            stream.height, stream.width, stream.pix_fmt = *film[0].shape[:2], pixels
            if stream.codec_context.name == "libx264":
                stream.codec_context.options = {"crf": "4"}
        if default:
            streams[1].disposition = type(streams[1].disposition)(0)
            streams[0].disposition = streams[0].disposition.default
        for stream, film in zip(streams, frames, strict=True):
            for number, picture in enumerate(film):
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=stream.pix_fmt)
                frame.pts, frame.time_base = number, Fraction(1, 10)
                file.mux(stream.encode(frame))
            file.mux(stream.encode())


def _attachment(path: Path) -> None:
    def attach(stream: Any) -> None:
        stream.container.add_attachment("cover.jpg", "image/jpeg", _jpeg(np.repeat(QUARTERS, 4, axis=0)))

    write_video(path, greys(20), prepare=attach)


STREAMS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "cover box": ("film.mp4", _cover_box),
    "attached cover": ("film.mkv", _attachment),
    "unmarked picture": ("film.mkv", lambda path: _beside(path, (32, 48), 1, ("mjpeg", "yuvj420p"), False)),
    "large preview": ("film.mp4", lambda path: _beside(path, (96, 144), 1, ("png", "rgb24"), False)),
    "default preview": ("film.mkv", lambda path: _beside(path, (96, 144), 1, ("mjpeg", "yuvj420p"), True)),
}


@pytest.mark.parametrize(("name", "make"), STREAMS.values(), ids=STREAMS)
def test_a_cover_beside_the_film_is_passed_over(
    tmp_path: Path, name: str, make: Callable[[Path], None]
) -> None:
    make(tmp_path / name)
    assert seen(tmp_path / name) == list(range(20))


@pytest.mark.parametrize("size", [(16, 24), (96, 144)], ids=str)
def test_of_two_films_ffmpeg_chooses(tmp_path: Path, size: tuple[int, int]) -> None:
    _beside(tmp_path / "film.mp4", size, 20, ("libx264", "yuv420p"), False)
    with av.open(str(tmp_path / "film.mp4")) as container:
        wanted = container.streams.best("video").index
    with open_video(tmp_path / "film.mp4", "it") as (_, stream):
        assert stream.index == wanted


def _sound(path: Path, picture: bool, mark: bool = True) -> None:
    with av.open(str(path), "w") as file:
        sound = file.add_stream("aac", rate=44100, layout="mono")
        if picture:
            cover = file.add_stream("mjpeg", rate=1)
            cover.height, cover.width, cover.pix_fmt = 32, 48, "yuvj420p"
            cover.disposition = cover.disposition.attached_pic if mark else cover.disposition
            frame = av.VideoFrame.from_ndarray(QUARTERS, format="rgb24").reformat(format="yuvj420p")
            frame.pts = 0
            for packet in [*cover.encode(frame), *cover.encode()]:
                file.mux(packet)
        for number in range(20):
            tone = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            tone.sample_rate, tone.pts = 44100, 1024 * number
            file.mux(sound.encode(tone))
        file.mux(sound.encode())


def test_sound_is_no_film(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    _sound(tmp_path / "in/alone.mp4", picture=False)
    _sound(tmp_path / "in/cover.mp4", picture=True)
    _sound(tmp_path / "in/picture.mkv", picture=True, mark=False)
    for number in range(2):
        write_video(tmp_path / f"in/film{number}.mp4", greys(10))
    options = ClipOptions((Clip(4, 16, 24, 5.0),), val=1, max_skipped_share=0.6)
    report = make_clips(tmp_path / "in", tmp_path / "out", options, need_captions=False)
    facts = {Path(name).name: reason for name, reason in report.skipped}
    assert sorted(facts) == ["alone.mp4", "cover.mp4", "picture.mkv"]
    assert "holds no video" in facts["alone.mp4"]
    assert "a cover picture but no film" in facts["cover.mp4"]
    assert "sound and one picture but no film" in facts["picture.mkv"]
    assert not any("damaged" in reason or "cut" in reason for reason in facts.values())


# Which frames

_NO_CHANGE = b"\0\0\1\xb6\x51\x9f"  # MPEG-4's "the picture stays", for times in tenths of a second


def _alternates(before: int) -> Callable[[list[Any]], Iterator[Parcel]]:
    """VP8's alternate references: bit 4 of the first byte says whether a frame is shown."""

    def packets(given: list[Any]) -> Iterator[Parcel]:
        for number, packet in enumerate(given):
            if number % 7 == 6:
                data = bytearray(bytes(packet))
                data[0] &= ~0x10
                yield bytes(data), packet.pts - before, False
            yield bytes(packet), packet.pts, packet.is_keyframe

    return packets


def _unchanged(given: list[Any]) -> Iterator[Parcel]:
    """MPEG-4 with packets that change nothing."""
    for number, packet in enumerate(given):
        yield bytes(packet), packet.pts, packet.is_keyframe
        if number % 5 == 4:
            yield _NO_CHANGE, packet.pts + 50, False


def _obus(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The units of an AV1 packet: their type and their bytes."""
    at = 0
    while at < len(data):
        place, size, shift, more = at + 1 + (data[at] >> 2 & 1), 0, 0, True
        while more:
            size, more = size | (data[place] & 127) << shift, data[place] > 127
            place, shift = place + 1, shift + 7
        yield data[at] >> 3 & 15, data[at : place + size]
        at = place + size


def _frame_by_frame(given: list[Any]) -> Iterator[Parcel]:
    """AV1 with a packet for every frame, also for those that are not shown."""
    for packet in given:
        parts = [b""]
        for kind, unit in _obus(bytes(packet)):
            parts[-1] += unit
            parts += [b""] * (kind in (3, 6))
        parts = [part for part in parts if part]
        for number, part in enumerate(parts):
            yield part, packet.pts - (len(parts) - 1 - number), packet.is_keyframe and not number


@pytest.mark.parametrize("cut", [None, 0.12], ids=["", "shots"])
@pytest.mark.parametrize("before", [1, 0], ids=["own time", "same time"])
def test_alternate_references_are_no_frames(tmp_path: Path, before: int, cut: float | None) -> None:
    source = write_video(tmp_path / "source.webm", greys(30), key_every=30)
    path = repack(source, tmp_path / "film.webm", _alternates(before))
    np.testing.assert_allclose(watch(path, cut).times, np.arange(30) / 10, atol=1e-9)
    wanted = levels(decoded(path))
    assert len(wanted) == 30
    assert levels(pictures(path, cut)) == wanted


def test_hidden_frames_of_av1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVT_LOG", "0")
    ramp = np.broadcast_to(np.arange(64, dtype=np.uint8)[None, :, None] * 3, (64, 64, 3))
    source = write_video(
        tmp_path / "source.mkv",
        [np.roll(ramp, 3 * number, axis=1) for number in range(30)],
        key_every=30,
        codec=("libsvtav1", "yuv420p", {"crf": "30", "preset": "8"}),
    )
    path = repack(source, tmp_path / "film.mkv", _frame_by_frame)
    with av.open(str(path)) as container:
        assert sum(1 for packet in container.demux(video=0) if packet.size) > 35, "some show no frame"
    np.testing.assert_allclose(watch(path).times, np.arange(30) / 10, atol=1e-9)
    with open_video(path, "it") as (container, stream):
        found = [upright(one.frame, "it") for one in shown(container, stream, "it")]
    assert np.array_equal(found, decoded(source))


def _packed(given: list[Any]) -> Iterator[Parcel]:
    """DivX's packed bitstream: a B-frame in the packet of the frame that it needs, then an empty frame."""
    kinds = [bytes(packet)[bytes(packet).index(b"\0\0\1\xb6") + 4] >> 6 for packet in given]
    for place, packet in enumerate(given):
        if kinds[place] == 2:  # a B-frame
            yield _NO_CHANGE, 100 * place, False
        else:
            packed = place + 1 < len(given) and kinds[place + 1] == 2
            mark = b"\0\0\1\xb2DivX503b1338p" if place < 2 else b""
            data = mark + bytes(packet) + (bytes(given[place + 1]) if packed else b"")
            yield data, 100 * place, packet.is_keyframe


def test_packed_frames_of_mpeg4(tmp_path: Path) -> None:
    def b_frames(stream: Any) -> None:
        stream.codec_context.max_b_frames = 1
        stream.codec_context.time_base = stream.time_base = Fraction(1, 10)

    codec = ("mpeg4", "yuv420p", {"qscale": "2"})
    source = write_video(tmp_path / "a.mkv", greys(20), codec=codec, key_every=100, prepare=b_frames)
    path = repack(source, tmp_path / "film.mkv", _packed)
    found = levels(pictures(path))
    assert found == sorted(found)
    assert len(found) >= 18, "FFmpeg needs some frames of 20 to learn that the times are wrong"


def test_empty_frames_of_mpeg4(tmp_path: Path) -> None:
    def tenths(stream: Any) -> None:
        stream.codec_context.time_base = stream.time_base = Fraction(1, 10)

    codec = ("mpeg4", "yuv420p", {"qscale": "2"})
    source = write_video(tmp_path / "a.mkv", greys(20), codec=codec, key_every=100, prepare=tenths)
    path = repack(source, tmp_path / "film.mkv", _unchanged)
    assert levels(pictures(path)) == levels(decoded(path))
    assert len(watch(path).times) >= 20


MIDDLE = {
    "h264": ("a.mkv", H264),
    "vp8": ("a.webm", ("libvpx", "yuv420p", {"b": "4M"})),
    "vp9": ("a.webm", ("libvpx-vp9", "yuv420p", {"b": "4M", "cpu-used": "8"})),
}


@pytest.mark.parametrize(("name", "codec"), MIDDLE.values(), ids=MIDDLE)
def test_a_recording_may_begin_between_two_key_frames(
    tmp_path: Path, name: str, codec: tuple[str, str, dict[str, str]]
) -> None:
    source = write_video(tmp_path / name, greys(30), codec=codec, key_every=10)
    path = repack(
        source,
        tmp_path / f"film{source.suffix}",
        lambda given: ((bytes(p), p.pts, p.is_keyframe) for p in given[4:]),
    )
    found = seen(path)
    assert found == list(range(found[0], 30))
    assert found[0] in range(4, 12)


@pytest.mark.parametrize("bits", ["intra-refresh=1:keyint=30", "open-gop=1:keyint=20:bframes=3"])
def test_frames_far_in_a_film_are_whole(tmp_path: Path, bits: str) -> None:
    codec = ("libx264", "yuv420p", {"crf": "4", "x264-params": bits})
    path = write_video(tmp_path / "film.mkv", greys(36) * 4, codec=codec)
    film = watch(path)
    for number in (105, 119, 140):
        (clip,) = read_clips(path, [float(film.times[number])], Clip(2, 16, 24, 10.0), film.times[-1])
        assert numbers(clip) == [number % 36, (number + 1) % 36]


# When


def test_of_two_frames_at_one_time_the_later_is_seen(tmp_path: Path) -> None:
    path = write_video(tmp_path / "film.mkv", greys(8), times=[0, 0.1, 0.2, 0.2001, 0.3, 0.4, 0.5, 0.6])
    assert seen(path) == [0, 1, 3, 4, 5, 6, 7]
    assert watch(path).times.tolist() == [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_films_that_begin_late(tmp_path: Path, suffix: str) -> None:
    path = write_video(tmp_path / f"film{suffix}", greys(8), times=[5 + n / 10 for n in range(8)])
    film = watch(path)
    assert (film.times[0], round(film.end, 3)) == (5.0, 5.8)
    assert seen(path) == list(range(8))


def test_times_that_jump_back_are_continued(tmp_path: Path) -> None:
    live = {"live": "1"}
    parts = [
        write_video(tmp_path / f"{name}.webm", frames, container=live).read_bytes()
        for name, frames in (("a", greys(36)[:15]), ("b", greys(36)[15:30]))
    ]
    (tmp_path / "film.webm").write_bytes(b"".join(parts))
    np.testing.assert_allclose(watch(tmp_path / "film.webm").times, np.arange(30) / 10, atol=1e-9)
    assert seen(tmp_path / "film.webm") == list(range(30))


def test_live_recordings_have_no_length_and_no_list_of_key_frames(tmp_path: Path) -> None:
    path = write_video(tmp_path / "film.webm", greys(36) * 4, container={"live": "1"})
    film = watch(path)
    assert (len(film.times), round(film.end, 3)) == (144, 14.4)
    (clip,) = read_clips(path, [12.0], Clip(3, 16, 24, 10.0), film.times[-1])
    assert numbers(clip) == [12, 13, 14]


def _patched(path: Path, at: int, *values: int) -> None:
    data = bytearray(path.read_bytes())
    data[at : at + 4 * len(values)] = struct.pack(f">{len(values)}i", *values)
    path.write_bytes(data)


def _field(path: Path, box: bytes, offset: int) -> tuple[int, int]:
    """A place in a box of an mp4 file, and the number there."""
    data = path.read_bytes()
    at = data.index(box) + 4 + offset
    return at, struct.unpack(">i", data[at : at + 4])[0]


def test_an_edit_list_may_show_a_part(tmp_path: Path) -> None:
    path = write_video(tmp_path / "film.mp4", greys(30), faststart=True)
    at, start = _field(path, b"elst", 12)
    _, ticks = _field(path, b"mdhd", 12)
    _patched(path, at - 4, 1000, start + ticks // 2)  # one second from 0.5 s on
    assert seen(path) == list(range(5, 15))


def test_a_header_may_promise_too_much(tmp_path: Path) -> None:
    path = write_video(tmp_path / "film.mp4", greys(12))
    for box in (b"mvhd", b"mdhd"):
        at, length = _field(path, box, 16)
        _patched(path, at, 4 * length)
    assert seen(path) == list(range(12))
    path = write_video(tmp_path / "film.mkv", greys(12))
    data = bytearray(path.read_bytes())
    at = data.index(b"\x44\x89\x88") + 3
    data[at : at + 8] = struct.pack(">d", 60000.0)
    path.write_bytes(data)
    assert seen(path) == list(range(12))


def test_a_title_in_other_letters_is_no_damage(tmp_path: Path) -> None:
    def title(stream: Any) -> None:
        stream.container.metadata["title"] = "a title in UTF-8"

    path = write_video(tmp_path / "film.mkv", greys(5), prepare=title)
    path.write_bytes(path.read_bytes().replace(b"a title in UTF-8", b"ein t\xfcrkis Titel"))
    assert seen(path) == list(range(5))


def _gif(path: Path) -> bytes:
    pictures = [Image.fromarray(picture) for picture in greys(12)]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=100, loop=0)
    return path.read_bytes()


def test_a_gif_needs_no_trailer(tmp_path: Path) -> None:
    path = tmp_path / "film.gif"
    data = _gif(path)
    for content in (data, data[:-1], data + bytes(40), data[:-1] + bytes(40), data + b"and more, with !;,"):
        path.write_bytes(content)
        assert seen(path) == list(range(12))
    for share in (0.3, 0.6, 0.95):
        path.write_bytes(data[: int(len(data) * share)])
        with refused(str(path), DataError):
            watch(path)


# Damage


def _noise(path: Path, **others: Any) -> bytes:
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 256, (32, 48, 3), dtype=np.uint8) for _ in range(30)]
    return write_video(path, frames, **others).read_bytes()


DAMAGE: dict[str, tuple[str, dict[str, Any], float]] = {
    "mp4": ("film.mp4", {"faststart": True}, 0.6),
    "mp4 near its end": ("film.mp4", {"faststart": True}, 0.95),
    "mkv": ("film.mkv", {}, 0.6),
    "mkv near its end": ("film.mkv", {}, 0.97),
    "webm": ("film.webm", {}, 0.8),
    "fragments": ("film.mp4", {"container": {"movflags": "frag_keyframe+empty_moov"}}, 0.5),
}


@pytest.mark.parametrize(("name", "others", "share"), DAMAGE.values(), ids=DAMAGE)
def test_films_that_were_cut(tmp_path: Path, name: str, others: dict[str, Any], share: float) -> None:
    data = _noise(tmp_path / name, **others)
    watch(tmp_path / name)
    (tmp_path / name).write_bytes(data[: int(len(data) * share)])
    with refused(str(tmp_path / name), DataError):
        watch(tmp_path / name)


def test_zeros_at_the_end_are_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVT_LOG", "0")
    path = tmp_path / "film.mp4"
    data = _noise(path, faststart=True, codec=("libsvtav1", "yuv420p", {"crf": "30", "preset": "8"}))
    kept = int(len(data) * 0.6)
    path.write_bytes(data[:kept] + bytes(len(data) - kept))  # AV1 decodes zeros to nothing, without an error
    with refused(str(path), DataError) as error:
        watch(path)
    assert "gives no frame after" in str(error.value)


# Which way up

# ISO 14496-12's a, b, c, d, and the filters by which FFmpeg's command turns the picture.
TURNS: dict[str, tuple[tuple[int, int, int, int], list[tuple[str, str]]]] = {
    "hflip": ((-1, 0, 0, 1), [("hflip", "")]),
    "vflip": ((1, 0, 0, -1), [("vflip", "")]),
    "180": ((-1, 0, 0, -1), [("hflip", ""), ("vflip", "")]),
    "90": ((0, 1, -1, 0), [("transpose", "clock")]),
    "270": ((0, -1, 1, 0), [("transpose", "cclock")]),
    "transpose": ((0, 1, 1, 0), [("transpose", "cclock_flip")]),
    "transverse": ((0, -1, -1, 0), [("transpose", "clock_flip")]),
    "zeros": ((0, 0, 0, 0), []),
}


def _turn(path: Path, a: float, b: float, c: float, d: float) -> None:
    at, _ = _field(path, b"tkhd", 40)
    values = (a, b, 0, c, d, 0, 0, 0, 2**14)
    _patched(path, at, *(round(value * 2**16) for value in values))


@pytest.mark.parametrize(("matrix", "filters"), TURNS.values(), ids=TURNS)
def test_pictures_are_turned_and_mirrored(
    tmp_path: Path, matrix: tuple[int, int, int, int], filters: list[tuple[str, str]]
) -> None:
    path = write_video(tmp_path / "film.mp4", [QUARTERS] * 4)
    wanted = by_filters(path, *filters)
    _turn(path, *matrix)
    assert np.array_equal(first_picture(path), wanted)
    height, width = wanted.shape[:2]
    assert watch(path).aspect == width / height
    clip = Clip(4, height, width, 10.0)
    assert measure_mp4(path.read_bytes(), "mp4")[:3] == (4, height, width), "members of shards too"
    assert np.array_equal(decode_mp4(path.read_bytes(), clip, "mp4")[0], wanted)
    (cut,) = read_clips(path, [0.0], clip, 0.3)
    assert np.array_equal(cut[0], wanted)


def test_other_angles_are_named(tmp_path: Path) -> None:
    path = write_video(tmp_path / "film.mp4", [QUARTERS] * 4)
    _turn(path, 0.7071, 0.7071, -0.7071, 0.7071)
    with refused(str(path), DataError) as error:
        watch(path)
    assert "45 degrees" in str(error.value)
    assert "damaged" not in str(error.value)
    _turn(path, 0.99995, 0.01, -0.01, 0.99995)  # half a degree, which FFmpeg takes as none
    assert np.array_equal(first_picture(path), by_filters(path))


@pytest.mark.parametrize("flip", ["horizontal", "vertical"])
def test_h264_may_say_itself_that_it_is_mirrored(tmp_path: Path, flip: str) -> None:
    source = write_video(tmp_path / "source.mp4", [QUARTERS] * 4)
    wanted = by_filters(source, (f"{flip[0]}flip", ""))
    with av.open(str(source)) as old, av.open(str(tmp_path / "film.mkv"), "w") as new:
        stream = old.streams.video[0]
        out = new.add_stream_from_template(stream)
        name = f"h264_metadata=display_orientation=insert:flip={flip}"
        change = av.bitstream.BitStreamFilterContext(name, stream, out)
        for packet in old.demux(stream):
            for changed in change.filter(packet if packet.size else None):
                changed.stream = out
                new.mux(changed)
    assert np.array_equal(first_picture(tmp_path / "film.mkv"), wanted)


def test_exif_turns_the_pictures_of_mjpeg(tmp_path: Path) -> None:
    source = write_video(tmp_path / "a.mkv", [QUARTERS] * 2, codec=("mjpeg", "yuvj420p", {}))
    turned = _jpeg(QUARTERS, orientation=6)
    path = repack(source, tmp_path / "film.mkv", lambda given: ((turned, p.pts, True) for p in given))
    picture = first_picture(path)
    assert picture.shape == (48, 32, 3)
    assert np.abs(picture.astype(int) - np.rot90(QUARTERS, -1)).mean() < 12


def test_pixels_need_not_be_squares(tmp_path: Path) -> None:
    def wide(stream: Any) -> None:
        stream.codec_context.sample_aspect_ratio = Fraction(2, 1)

    path = write_video(tmp_path / "film.mp4", [QUARTERS] * 4, prepare=wide)
    assert watch(path).aspect == 3.0
    (clip,) = read_clips(path, [0.0], Clip(1, 16, 48, 10.0), 0.3)
    wanted = np.asarray(Image.fromarray(by_filters(path)).resize((48, 16), Image.Resampling.BICUBIC))
    assert np.array_equal(clip[0], wanted), "the whole picture"
    _turn(path, 0, 1, -1, 0)
    assert watch(path).aspect == pytest.approx(1 / 3)


# Which colours


@pytest.mark.parametrize("full", [False, True], ids=["limited", "full"])
@pytest.mark.parametrize("space", [1, 5, 9], ids=["709", "601", "2020"])
def test_colours_follow_their_space_and_range(tmp_path: Path, space: int, full: bool) -> None:
    def colours(stream: Any) -> None:
        stream.codec_context.colorspace, stream.codec_context.color_range = space, 2 if full else 1

    path = write_video(tmp_path / "film.mp4", [QUARTERS] * 4, prepare=colours)
    assert np.array_equal(first_picture(path), by_filters(path))


PIXELS = {
    "10 bit": ("film.mkv", ("libx264", "yuv420p10le", {"crf": "4"}), (32, 48)),
    "full range": ("film.mp4", ("libx264", "yuvj420p", {"crf": "4"}), (32, 48)),
    "odd": ("film.mkv", ("ffv1", "yuv420p", {}), (31, 47)),
    "grey": ("film.mkv", ("ffv1", "gray", {}), (32, 48)),
    "16 bit grey": ("film.mkv", ("ffv1", "gray16le", {}), (32, 48)),
    "ProRes 4444": ("film.mov", ("prores_ks", "yuva444p10le", {}), (32, 48)),
    "VP9 with alpha": ("film.webm", ("libvpx-vp9", "yuva420p", {"b": "4M", "cpu-used": "8"}), (32, 48)),
    "rgb": ("film.mkv", LOSSLESS, (32, 48)),
    "interlaced": ("film.mp4", ("libx264", "yuv420p", {"crf": "4", "flags": "+ildct+ilme"}), (32, 48)),
}


@pytest.mark.parametrize(("name", "codec", "size"), PIXELS.values(), ids=PIXELS)
def test_levels_of_all_kinds_of_pixels(
    tmp_path: Path, name: str, codec: tuple[str, str, dict[str, str]], size: tuple[int, int]
) -> None:
    assert seen(write_video(tmp_path / name, greys(6, size), codec=codec)) == list(range(6))


def test_colours_that_ffmpeg_cannot_convert_are_named(tmp_path: Path) -> None:
    def colours(stream: Any) -> None:
        stream.codec_context.colorspace = 14  # ICtCp

    path = write_video(tmp_path / "film.mp4", [QUARTERS] * 4, prepare=colours)
    with refused(str(path), DataError) as error:
        watch(path, 0.12)
    assert "colour space 14" in str(error.value)
    assert "damaged" not in str(error.value)


# The Python door


@pytest.mark.slow  # starts processes, as test_clips_module.py does in `make test`
def test_the_data_module_cuts_what_the_command_cuts(tmp_path: Path) -> None:
    films = tmp_path / "in"
    films.mkdir()
    _cover_box(films / "cover.mp4")
    repack(write_video(tmp_path / "a.webm", greys(30)), films / "hidden.webm", _alternates(1))
    path = write_video(films / "mirrored.mp4", [QUARTERS] * 20)
    _turn(path, -1, 0, 0, 1)
    for film in films.iterdir():
        film.with_suffix(".txt").write_text(film.stem)
    clips = ClipConfig(frames=4, size=24, rate=10.0, val=0.3)
    data = build(
        ClipDataModule,
        text_encoder=TextEncoding("words:8", 6, 8),
        path=str(tmp_path / "module"),
        source=str(films),
        clips=clips,
        batch_size=4,
        num_workers=0,
    )
    data.prepare_data()
    make_clips(films, tmp_path / "cli", ClipOptions((Clip(4, 24, 24, 10.0),), val=0.3, val_by="time"))
    for split in ("train", "val"):
        hashes = [read_index(tmp_path / name / split).hash for name in ("module", "cli")]
        assert hashes[0] == hashes[1]
    stored = Split(read_index(tmp_path / "cli/train"), LocalStore(tmp_path / "cli/train"))
    by_film = {
        (sample["txt"], sample["clip.npy"]): index
        for index, sample in enumerate(stored.read(range(stored.samples)))
    }
    first = {text: np.load(io.BytesIO(clip)) for text, clip in reversed(list(by_film))}
    assert numbers(first[b"cover"]) == numbers(first[b"hidden"]) == [0, 1, 2, 3]
    assert first[b"mirrored"][0, 2, 2].argmax() == 1, "green is at the left"
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    for index, clip in zip(batch["index"].tolist(), data.to_videos(batch["clip"]), strict=True):
        found = next(content for (_, content), place in by_film.items() if place == index)
        assert np.array_equal(clip.numpy(), np.load(io.BytesIO(found)))
    data.teardown("fit")


def test_no_threads_are_left_behind_a_frame(tmp_path: Path) -> None:
    """A loader's worker may be forked while frames are held; it would wait for their threads for ever."""
    film = write_video(tmp_path / "film.mp4", greys(4), 10)
    before = threads()
    with open_video(film, "film.mp4") as (container, stream):
        held = [
            (frame, upright(frame, "film.mp4"), thumbnail(frame, 8, "film.mp4"))
            for frame, *_ in shown(container, stream, "film.mp4")
        ]
        assert len(held) == 4
        assert threads() == before


def threads() -> int:
    """The threads of this process."""
    return len(os.listdir("/proc/self/task"))
