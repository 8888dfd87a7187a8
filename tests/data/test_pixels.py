"""Images of every mode and format; the right means are computed without Pillow."""

from __future__ import annotations

import colorsys
import io
import logging
import struct
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mhla_lightning.data import Augmentation
from mhla_lightning.data.index import read_index
from mhla_lightning.data.kinds.images import Images, decode_image
from mhla_lightning.data.pixels import (
    FILE_FORMATS,
    REDUCED,
    SEVERAL,
    TRANSPARENT,
    BadImage,
    check_header,
    decode,
    eight_bits,
)
from mhla_lightning.data.prepare.indexing import index_shards
from mhla_lightning.data.prepare.latents.images import picture
from mhla_lightning.data.prepare.pack import PackOptions, pack
from mhla_lightning.data.prepare.preview import preview
from mhla_lightning.data.prepare.samples import Sample
from mhla_lightning.data.prepare.verify import verify
from mhla_lightning.data.skips import BadSample
from mhla_lightning.data.split import Split
from mhla_lightning.data.stores import LocalStore
from mhla_lightning.errors import DataError
from tests.helpers.errors import refused

H, W = 6, 8
RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (H, W), dtype=np.uint8)
RGB = RNG.integers(0, 256, (H, W, 3), dtype=np.uint8)
ALPHA = RNG.integers(0, 256, (H, W), dtype=np.uint8)
RAMP = np.linspace(0, 65535, H * W).reshape(H, W).astype(np.uint16)
COLOURS = RNG.integers(0, 256, (4, 3), dtype=np.uint8)
PLACES = RNG.integers(0, 4, (H, W), dtype=np.uint8)


def _raw(mode: str, *channels: np.ndarray) -> Image.Image:
    return Image.frombytes(
        mode, (W, H), np.stack(channels, -1).tobytes() if channels[1:] else channels[0].tobytes()
    )


def _on_white(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return colours.reshape(H, W, -1) * share + 255 * (1 - share)


def _paletted(mode: str, *channels: np.ndarray) -> Image.Image:
    image = _raw(mode, *channels)
    image.putpalette(COLOURS.tobytes())
    return image


def _hsv(pixels: np.ndarray) -> np.ndarray:
    return 255 * np.array([colorsys.hsv_to_rgb(*(pixel / 255)) for pixel in pixels.reshape(-1, 3)])


def _ycbcr(pixels: np.ndarray) -> np.ndarray:
    y, cb, cr = (pixels[..., n].astype(float) for n in range(3))
    red, green = y + 1.402 * (cr - 128), y - 0.344136 * (cb - 128) - 0.714136 * (cr - 128)
    return np.clip(np.stack([red, green, y + 1.772 * (cb - 128)], -1), 0, 255)


def _lightness(value: int) -> float:
    linear = ((100 * value / 255 + 16) / 116) ** 3
    return 255 * (1.055 * linear ** (1 / 2.4) - 0.055)


PREMULTIPLIED = (RGB * (ALPHA[..., None] / 255)).astype(np.uint8)
BITS = (GREY > 99).astype(np.uint8)
# The image, and its pixels as they must be: (H, W, 3), (H, W, 1) or one value.
MODES: dict[str, tuple[Image.Image, np.ndarray | float]] = {
    "1": (Image.frombytes("1", (W, H), np.packbits(BITS, axis=1).tobytes()), BITS[..., None] * 255.0),
    "L": (_raw("L", GREY), GREY[..., None]),
    "LA": (_raw("LA", GREY, ALPHA), _on_white(GREY, ALPHA)),
    "La": (_raw("La", PREMULTIPLIED[..., 0], ALPHA), PREMULTIPLIED[..., :1] + 255.0 - ALPHA[..., None]),
    "P": (_paletted("P", PLACES), COLOURS[PLACES]),
    "PA": (_paletted("PA", PLACES, ALPHA), _on_white(COLOURS[PLACES], ALPHA)),
    "RGB": (Image.fromarray(RGB), RGB),
    "RGBA": (_raw("RGBA", *RGB.transpose(2, 0, 1), ALPHA), _on_white(RGB, ALPHA)),
    "RGBa": (
        _raw("RGBa", *PREMULTIPLIED.transpose(2, 0, 1), ALPHA),
        PREMULTIPLIED + 255.0 - ALPHA[..., None],
    ),
    "RGBX": (_raw("RGBX", *RGB.transpose(2, 0, 1), ALPHA), RGB),
    "CMYK": (
        _raw("CMYK", *RGB.transpose(2, 0, 1), GREY),
        (255.0 - RGB) * (255.0 - GREY[..., None]) / 255,
    ),
    "YCbCr": (_raw("YCbCr", *RGB.transpose(2, 0, 1)), _ycbcr(RGB)),
    "HSV": (_raw("HSV", *RGB.transpose(2, 0, 1)), _hsv(RGB)),
    "LAB": (Image.new("LAB", (W, H), (128, 128, 128)), _lightness(128)),
    "I;16": (_raw("I;16", RAMP.astype("<u2")), (RAMP >> 8)[..., None]),
    "I;16L": (_raw("I;16L", RAMP.astype("<u2")), (RAMP >> 8)[..., None]),
    "I;16B": (_raw("I;16B", RAMP.astype(">u2")), (RAMP >> 8)[..., None]),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_has_its_right_pixels(mode: str) -> None:
    image, right = MODES[mode]
    assert image.mode == mode
    found, remarks = eight_bits(image)
    pixels = np.asarray(found.convert("RGB")).astype(float)
    expected = np.broadcast_to(
        np.asarray(right, float).reshape((H, W, -1) if np.ndim(right) else ()), (H, W, 3)
    )
    assert found.mode in ("L", "RGB")
    assert np.abs(pixels - expected).max() <= (4 if mode in ("HSV", "YCbCr", "RGBa", "La") else 1.1)
    assert abs(pixels.mean() - expected.mean()) < 1
    assert (TRANSPARENT in remarks) == (mode in ("LA", "La", "PA", "RGBA", "RGBa"))
    assert (REDUCED in remarks) == mode.startswith("I;16")


def test_every_mode_of_pillow_is_tried() -> None:
    assert {mode for mode in Image.MODES if not mode.startswith("BGR")} - {"I;16N"} == {*MODES, "I", "F"}


@pytest.mark.parametrize("mode", ["I", "F"])
def test_values_of_an_unknown_range_are_refused(mode: str) -> None:
    with pytest.raises(BadImage, match=f"mode {mode}"):
        eight_bits(Image.new(mode, (W, H)))


def _saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _png(depth: int, colour: int, rows: Iterable[bytes], transparent: bytes = b"") -> bytes:
    """A PNG of any bit depth and colour type, which Pillow cannot write."""
    head = struct.pack(">IIBBBBB", W, H, depth, colour, 0, 0, 0)
    key = _chunk(b"tRNS", transparent) if transparent else b""
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head) + key + _chunk(b"IDAT", body) + _chunk(b"IEND", b"")


def _png16(*channels: np.ndarray, transparent: bytes = b"") -> bytes:
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[len(channels)]
    return _png(16, colour, (row.astype(">u2").tobytes() for row in np.stack(channels, -1)), transparent)


def _tiff(data: bytes, bits: int, photometric: int = 1, sample_format: int = 1, order: str = "<") -> bytes:
    """An uncompressed TIFF of one grey channel."""
    tags = {
        256: W,
        257: H,
        258: bits,
        259: 1,
        262: photometric,
        273: 8,
        277: 1,
        278: H,
        279: len(data),
        339: sample_format,
    }
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags.items())
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(data))
    return start + data + struct.pack(f"{order}H", len(tags)) + entries + bytes(4)


def _twelve(values: np.ndarray) -> bytes:
    """Two values of 12 bits in three bytes."""
    pairs = values.reshape(-1, 2).astype(int)
    return (
        np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], -1)
        .astype(np.uint8)
        .tobytes()
    )


def _rows(values: np.ndarray, bits: int) -> list[bytes]:
    """Rows of values of 1, 2 or 4 bits, the first in the upper bits of a byte."""
    each = 8 // bits
    shifts = np.arange(each)[::-1] * bits
    return [(row.reshape(-1, each) << shifts).sum(1).astype(np.uint8).tobytes() for row in values]


UPPER = (RAMP >> 8)[..., None]
DEEP = [RAMP, np.flipud(RAMP), np.fliplr(RAMP)]
COVERED = np.roll(RAMP, 11)
DEEP_RGB = np.stack([channel >> 8 for channel in DEEP], -1)
TWO_BITS = (GREY >> 6).astype(np.uint8)
FOUR_BITS = (GREY >> 4).astype(np.uint8)
KEYED = np.where(RAMP[2, 3] == RAMP, 255, RAMP >> 8)[..., None]
FILES: dict[str, tuple[bytes, np.ndarray]] = {
    "PNG of 16 bits": (_png16(RAMP), UPPER),
    "PNG of 16 bits by Pillow": (_saved(Image.fromarray(RAMP), "PNG"), UPPER),
    "PNG of 16 bits with a transparent value": (
        _png16(RAMP, transparent=struct.pack(">H", RAMP[2, 3])),
        KEYED,
    ),
    "PNG of 16-bit grey and alpha": (_png16(RAMP, COVERED), _on_white(RAMP >> 8, COVERED >> 8)),
    "PNG of 16-bit RGB": (_png16(*DEEP), DEEP_RGB),
    "PNG of 16-bit RGB with a transparent colour": (
        _png16(*DEEP, transparent=struct.pack(">HHH", *(channel[0, 0] for channel in DEEP))),
        DEEP_RGB,
    ),
    "PNG of 16-bit RGBA": (_png16(*DEEP, COVERED), _on_white(DEEP_RGB, COVERED >> 8)),
    "PNG of 8-bit grey with a transparent value": (
        _png(8, 0, (row.tobytes() for row in GREY), struct.pack(">H", GREY[1, 1])),
        np.where(GREY[1, 1] == GREY, 255, GREY)[..., None],
    ),
    "PNG of 8-bit RGB with a transparent colour": (
        _png(8, 2, (row.tobytes() for row in RGB), struct.pack(">HHH", *RGB[1, 1])),
        np.where((RGB[1, 1] == RGB).all(-1, keepdims=True), 255, RGB),
    ),
    "PNG of 2 bits with a transparent value": (
        _png(2, 0, _rows(TWO_BITS, 2), b"\0\1"),
        np.where(TWO_BITS == 1, 255, TWO_BITS * 85)[..., None],
    ),
    "PNG of 4 bits with a transparent value": (
        _png(4, 0, _rows(FOUR_BITS, 4), b"\0\5"),
        np.where(FOUR_BITS == 5, 255, FOUR_BITS * 17)[..., None],
    ),
    "PNG of 1 bit with a transparent value": (
        _png(1, 0, _rows(BITS, 1), b"\0\0"),
        np.full((H, W, 1), 255),
    ),
    "PNG with a palette of alphas": (
        _saved(_paletted("P", PLACES), "PNG", transparency=bytes([0, 80, 160, 255])),
        _on_white(COLOURS[PLACES], np.array([0, 80, 160, 255])[PLACES]),
    ),
    "GIF with a transparent colour": (
        _saved(_paletted("P", PLACES), "GIF", transparency=2),
        np.where((PLACES == 2)[..., None], 255, COLOURS[PLACES]),
    ),
    "TIFF of 16 bits": (_tiff(RAMP.astype("<u2").tobytes(), 16), UPPER),
    "TIFF of 16 bits, big endian": (_tiff(RAMP.astype(">u2").tobytes(), 16, order=">"), UPPER),
    "TIFF of 16 bits, compressed": (
        _saved(Image.fromarray(RAMP), "TIFF", compression="tiff_lzw"),
        UPPER,
    ),
    "TIFF of 16 bits, white is zero": (_tiff(RAMP.astype("<u2").tobytes(), 16, photometric=0), 255 - UPPER),
    "TIFF of 12 bits": (_tiff(_twelve(RAMP >> 4), 12), UPPER),
    "PGM of 16 bits": (b"P5\n8 6\n65535\n" + RAMP.astype(">u2").tobytes(), UPPER),
    "PGM of 10 bits": (b"P5\n8 6\n1023\n" + (RAMP >> 6).astype(">u2").tobytes(), UPPER),
    "JPEG of CMYK, inverted as by Adobe": (
        _saved(Image.new("CMYK", (W, H), (200, 100, 50, 25)), "JPEG", quality=100),
        (255.0 - np.array([200, 100, 50])) * (255 - 25) / 255 * np.ones((H, W, 3)),
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_files_have_their_right_pixels(name: str) -> None:
    data, right = FILES[name]
    check_header(data, FILE_FORMATS)
    pixels = np.asarray(decode(data, FILE_FORMATS).image.convert("RGB")).astype(float)
    expected = np.broadcast_to(right.astype(float), (H, W, 3))
    assert np.abs(pixels - expected).max() <= 2
    assert abs(pixels.mean() - expected.mean()) < 1


UNKNOWN = {
    "float TIFF": _tiff((RAMP / 65535).astype("<f4").tobytes(), 32, sample_format=3),
    "TIFF of 32-bit integers": _tiff(RAMP.astype("<u4").tobytes(), 32),
    "TIFF of signed integers": _tiff((RAMP >> 1).astype("<i2").tobytes(), 16, sample_format=2),
    "PFM": b"Pf\n8 6\n-1.0\n" + (RAMP / 65535).astype("<f4").tobytes(),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_files_of_an_unknown_range_are_refused(tmp_path: Path, name: str) -> None:
    source = _source(tmp_path, {"odd.tif": UNKNOWN[name]})
    with pytest.raises(BadImage, match="range"):
        check_header(UNKNOWN[name], FILE_FORMATS)
    with refused(str(source / "a" / "odd.tif"), DataError) as error:
        pack(source, tmp_path / "out")
    assert "8 or 16 bits" in error.value.reason


def _source(root: Path, files: dict[str, bytes]) -> Path:
    for label in "ab":
        (root / "source" / label).mkdir(parents=True)
        for name, data in {**files, "plain.png": _saved(Image.fromarray(RGB), "PNG")}.items():
            (root / "source" / label / name).write_bytes(data)
    return root / "source"


def _samples(split: Path) -> list[dict]:
    found = Split(read_index(split), LocalStore(split))
    return found.read(range(found.samples))


def test_16_bits_are_right_from_packing_to_training(tmp_path: Path) -> None:
    """The mean of a ramp is 127.5, and 0.4 % of its values are 255: alike by every door."""
    ramp = np.linspace(0, 65535, 64 * 48).reshape(48, 64).astype(np.uint16)
    for label in "ab":
        (tmp_path / "source" / label).mkdir(parents=True)
        for suffix in ("png", "tiff"):
            Image.fromarray(ramp).save(tmp_path / "source" / label / f"{suffix}.{suffix}")
    notes: list[str] = []
    pack(tmp_path / "source", tmp_path / "out", PackOptions(val=2), on_note=notes.append)
    assert notes == [f"4 images {REDUCED}"]
    for path in (tmp_path / "out").rglob("index.json"):
        path.unlink()
    index_shards(str(tmp_path / "out"), on_note=notes.append)
    assert len(notes) == 1, "the index has nothing to say against them"
    assert verify(str(tmp_path / "out")).problems == []
    plain = Augmentation(crop_pct=1.0, mean=(0.0,) * 3, std=(1.0,) * 3)
    kind = Images(2, (48, 64), plain)
    samples = [*_samples(tmp_path / "out" / "train"), *_samples(tmp_path / "out" / "val")]
    assert len(samples) == 4
    for sample in samples:
        found = np.asarray(decode_image(sample)).astype(float)
        assert found.mean() == pytest.approx((ramp >> 8).mean()) == pytest.approx(127.5)
        assert (found == 255).mean() == pytest.approx(0.0039, abs=1e-4)
        assert float(kind.evaluate(sample)["image"].mean()) * 255 == pytest.approx(127.5, abs=0.1)
        encoded = picture(Sample("x", {k: v for k, v in sample.items() if not k.startswith("__")}), 48, 2)
        assert not isinstance(encoded, BadSample)
        assert encoded.pixels.mean() == pytest.approx(127.5, abs=0.6)


TURNED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}
XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="{}"/>'
    "</rdf:RDF></x:xmpmeta>"
)
LOSSLESS: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 95, "subsampling": 0},
    "PNG": {},
    "WEBP": {"lossless": True},
    "TIFF": {},
}


def _told(number: int, kind: str, by: str) -> dict[str, Any]:
    """Options of Image.save that write an orientation."""
    if by == "exif":
        exif = Image.Exif()
        exif[274] = number
        return {"exif": exif}
    text = XMP.format(number)
    if kind == "PNG":
        info = PngInfo()
        info.add_itxt("XML:com.adobe.xmp", text)
        return {"pnginfo": info}
    return {"tiffinfo": {700: text.encode()}} if kind == "TIFF" else {"xmp": text.encode()}


@pytest.mark.parametrize("by", ["exif", "xmp"])
@pytest.mark.parametrize("kind", LOSSLESS)
def test_an_orientation_is_applied_once(tmp_path: Path, kind: str, by: str) -> None:
    """In files that are kept (JPEG, PNG) as in those that are encoded anew."""
    dark, bright = np.zeros((24, 16, 3), np.uint8), np.full((24, 16, 3), 255, np.uint8)
    pixels = np.concatenate([np.concatenate([bright, dark], 1), np.concatenate([dark, dark], 1)], 0)
    for number in TURNED:
        folder = tmp_path / "source" / str(number)
        folder.mkdir(parents=True)
        data = _saved(Image.fromarray(pixels), kind, **LOSSLESS[kind], **_told(number, kind, by))
        (folder / f"{number}.{kind.lower()}").write_bytes(data)
        (folder / f"{number}b.{kind.lower()}").write_bytes(data)
    pack(tmp_path / "source", tmp_path / "out", PackOptions(val=2, shards=1))
    classes = read_index(tmp_path / "out" / "train").classes
    samples = [*_samples(tmp_path / "out" / "train"), *_samples(tmp_path / "out" / "val")]
    assert len(samples) == 16
    for sample in samples:
        number = int(classes[int(sample["cls"])])
        found = np.asarray(decode_image(sample)).astype(float)
        right = TURNED[number](pixels)
        assert found.shape == right.shape, (kind, number)
        assert np.abs(found - right).mean() < 2, (kind, number)


def test_one_limit_of_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packing refuses what training would skip; index, verify and preview agree with it."""
    size = (300, 200)
    source = _source(tmp_path, {"large.png": _saved(Image.new("L", size, 7), "PNG")})
    pack(source, tmp_path / "out", PackOptions(val=2))
    for most in (size[0] * size[1] - 1, size[0] * size[1] // 3):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
        with refused(str(source / "a" / "large.png"), DataError) as error:
            pack(source, tmp_path / "other")
        assert "60,000" in error.value.reason
        assert f"{most:,}" in error.value.reason
        notes: list[str] = []
        index_shards(str(tmp_path / "out"), overwrite=True, on_note=notes.append)
        assert sum(int(note.split()[1]) for note in notes) == 2, notes
        report = verify(str(tmp_path / "out"))
        assert report.unusable == 2
        assert all(
            "60,000" in problem.problem and f"{most:,}" in problem.problem for problem in report.problems
        )
        assert sum(preview(str(tmp_path / "out"), split).unusable for split in ("train", "val")) == 2
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", size[0] * size[1])
    assert verify(str(tmp_path / "out")).found == 0
    pack(source, tmp_path / "other")


def test_the_first_frame_is_taken_and_the_others_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    frames = [Image.new("RGB", (W, H), colour) for colour in ((0, 0, 200), (200, 0, 0), (0, 200, 0))]
    moving = {"save_all": True, "append_images": frames[1:]}
    files = {
        "a.gif": _saved(frames[0], "GIF", **moving),
        "a.webp": _saved(frames[0], "WEBP", lossless=True, **moving),
        "a.png": _saved(frames[0], "PNG", **moving),
        "a.tif": _saved(frames[0], "TIFF", **moving),
    }
    with caplog.at_level(logging.INFO):
        pack(_source(tmp_path, files), tmp_path / "out", PackOptions(val=2, shards=1))
    assert f"8 images {SEVERAL}" in caplog.messages
    means = [
        np.asarray(decode_image(sample)).mean((0, 1)).round().tolist()
        for split in ("train", "val")
        for sample in _samples(tmp_path / "out" / split)
    ]
    assert means.count([0, 0, 200]) == 8


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF"])
def test_a_cut_image_is_refused(tmp_path: Path, kind: str) -> None:
    noise = Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    whole = _saved(noise.quantize(64) if kind == "GIF" else noise, kind)
    decode(whole, FILE_FORMATS)
    for share in (0.3, 0.9):
        with pytest.raises(BadImage) as error:
            decode(whole[: int(len(whole) * share)], FILE_FORMATS)
        assert str(error.value).isprintable()


def test_damaged_attributes_leave_the_pixels(recwarn: pytest.WarningsRecorder) -> None:
    data = _saved(Image.fromarray(RGB), "JPEG", quality=95, exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert decode(data).image.size == (W, H)
    assert not recwarn.list


def test_names_of_members_do_not_matter() -> None:
    """A WebP called .jpg, as in shards of crawled images."""
    data = _saved(Image.fromarray(RGB), "WEBP", lossless=True)
    for name in ("webp", "jpg", "jpeg", "png"):
        assert (np.asarray(decode_image({"__key__": "a", name: data})) == RGB).all()
    with pytest.raises(BadSample, match="neither JPEG, PNG nor WebP"):
        decode_image({"__key__": "a", "jpg": _saved(Image.fromarray(RGB), "BMP")})
