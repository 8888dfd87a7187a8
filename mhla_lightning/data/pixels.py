"""Encoded images to upright 8-bit pixels: alike in packing, checks, training, evaluation.

Values of 16 bits keep their upper 8. Transparent pixels are laid on white. The orientation in EXIF or XMP is
applied. Of several frames or pages, the first is taken. Colour profiles are not applied. An image whose
range of values is not known is refused, and one of more pixels than Pillow's MAX_IMAGE_PIXELS.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

# The formats that Pillow decodes by itself: its PostScript plugin would start a program.
SHARD_FORMATS = ("JPEG", "PNG", "WEBP")
FILE_FORMATS = (*SHARD_FORMATS, "BMP", "GIF", "PPM", "TIFF")
SEVERAL, TRANSPARENT, REDUCED = (
    "with several frames or pages (the first is taken)",
    "with transparent pixels (they are laid on white)",
    "of 16 bits a value (the upper 8 are taken)",
)
_WHITE = 255
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # tags of TIFF, and a value of the second
# PNG's greys of 2 and 4 bits are scaled to 8 bits by Pillow; their transparent value is not.
_SCALES = {"L;2": 85, "L;4": 17}
_OTHER_COLOURS = ("CMYK", "LAB")  # modes whose colour profiles do not describe RGB
_ATTRIBUTES = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp", "transparency")
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_QUARTER_TURNS = (5, 6, 7, 8)


class BadImage(Exception):
    """An image that cannot be used; its text is the reason."""


class Decoded(NamedTuple):
    """An image, and what was done to it.

    Args:
        image: of mode L or RGB.
        remarks: some of SEVERAL, TRANSPARENT and REDUCED.
    """

    image: Image.Image
    remarks: tuple[str, ...]


def decode(data: bytes, formats: tuple[str, ...] = SHARD_FORMATS) -> Decoded:
    """Decode the first frame of an encoded image.

    Args:
        data: content of a file.
        formats: of Pillow that are tried.

    Raises:
        BadImage: no such format, cut or damaged data, too many pixels, or values of an unknown range.
    """
    with _opened(data, formats) as image:
        several = image.format != "MPO" and getattr(image, "is_animated", False)
        raw, bits = _raw_mode(image), _bits(image)
        image.load()
        if raw in _SCALES and "transparency" in image.info:
            image.info["transparency"] *= _SCALES[raw]
        plain, remarks = eight_bits(image, bits)
        return Decoded(plain, (SEVERAL, *remarks) if several else remarks)


def check_header(data: bytes, formats: tuple[str, ...] = SHARD_FORMATS) -> None:
    """Raise BadImage for what the header of an image shows: format, pixels, range of values."""
    with _opened(data, formats) as image:
        _demand_range(image.mode, _bits(image))


def size_of(data: bytes, formats: tuple[str, ...] = SHARD_FORMATS) -> tuple[int, int]:
    """Return (height, width) of an encoded image, upright, by its header.

    Raises:
        BadImage: as check_header.
    """
    with _opened(data, formats) as image:
        turn = image.getexif().get(ExifTags.Base.Orientation, 1)
        return (image.width, image.height) if turn in _QUARTER_TURNS else (image.height, image.width)


def check_sums(data: bytes, formats: tuple[str, ...] = SHARD_FORMATS) -> None:
    """Raise BadImage for checksums (of PNG) that do not fit; decoding does not read all of them."""
    with _opened(data, formats) as image:
        image.verify()


def eight_bits(image: Image.Image, bits: int | None = None) -> Decoded:
    """Return an opened image upright, with 8 bits a value and without transparency.

    Args:
        image: of any mode of Pillow.
        bits: of a value, for a file with more than 8; None takes 16 for the modes I;16, I;16B and so on.

    Raises:
        BadImage: the range of its values is not known.
    """
    bits = bits or (16 if image.mode.startswith("I;16") else None)
    _demand_range(image.mode, bits)
    found = _plain(_upright(image), bits)
    for name in _ATTRIBUTES:  # an orientation that is applied must not be applied again
        found.image.info.pop(name, None)
    return found


def _plain(image: Image.Image, bits: int | None) -> Decoded:
    """Reduce values of more bits, and lay transparent pixels on white."""
    if image.mode.startswith("I"):
        return _upper_bits(image, bits or 16)
    remarks = (REDUCED,) if bits else ()
    transparent = image.info.get("transparency")
    if image.mode in ("1", "L", "RGB"):
        if transparent is not None and not bits:  # of 16 bits, the exact colours are gone
            return Decoded(_without_colour(image, transparent), (TRANSPARENT,))
        return Decoded(image.convert("RGB" if image.mode == "RGB" else "L"), remarks)
    if image.has_transparency_data:
        return _on_white(image, remarks)
    plain = image.convert("RGB")
    if image.mode in _OTHER_COLOURS:
        plain.info.pop("icc_profile", None)
    return Decoded(plain, remarks)


@contextmanager
def _opened(data: bytes, formats: tuple[str, ...]) -> Iterator[Image.Image]:
    """Give the block an image of an acceptable size; whatever Pillow raises becomes BadImage."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # about damaged attributes, and about sizes, which are checked here
            with Image.open(io.BytesIO(data), formats=formats) as image:
                _demand_size(image)
                yield image
    except BadImage:
        raise
    except Image.DecompressionBombError as error:
        pixels = re.search(r"\d+", str(error))
        raise BadImage(_too_large(int(pixels[0]) if pixels else 0)) from error
    except UnidentifiedImageError as error:
        raise BadImage(f"it is none of {', '.join(formats)}, or its header is damaged") from error
    except Exception as error:  # Pillow's plugins raise nearly anything on damaged bytes
        raise BadImage(str(error) or type(error).__name__) from error


def _demand_size(image: Image.Image) -> None:
    most = Image.MAX_IMAGE_PIXELS
    if most is not None and image.width * image.height > most:
        raise BadImage(f"{image.width} x {image.height}: {_too_large(image.width * image.height)}")


def _too_large(pixels: int) -> str:
    return f"it has {pixels:,} pixels, and at most {Image.MAX_IMAGE_PIXELS:,} are read: make it smaller"


def _raw_mode(image: Image.Image) -> str:
    """Return Pillow's name of the values in the file, such as `RGB;16B`, before they are loaded."""
    tiles = getattr(image, "tile", ())
    found = tiles[0][3] if tiles else ""
    return str(found[0] if isinstance(found, tuple) and found else found)


def _bits(image: Image.Image) -> int | None:
    """Return the bits of a value where a file has more than 8 and its range is known, else None."""
    if image.mode.startswith("I;16") and image.format == "TIFF":
        return int(image.tag_v2[_BITS_PER_SAMPLE][0])  # type: ignore[attr-defined]  # 12 or 16
    if image.mode == "I":
        return 16 if image.format in ("PNG", "PPM") else None  # Pillow scales the values of PPM to 16 bits
    return 16 if ";16" in _raw_mode(image) else None


def _demand_range(mode: str, bits: int | None) -> None:
    if mode == "F" or (mode == "I" and bits is None):
        what = "floats" if mode == "F" else "signed or 32-bit integers"
        raise BadImage(f"its values are {what} of an unknown range (mode {mode}): scale them to 8 or 16 bits")


def _upright(image: Image.Image) -> Image.Image:
    """Turn or mirror an image by its Orientation.

    Pillow does so itself when it loads TIFF, and removes the tag.
    """
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # noqa: BLE001  damaged attributes leave the pixels usable
        return image
    return image if turn is None else image.transpose(turn)


def _upper_bits(image: Image.Image, bits: int) -> Decoded:
    values = np.asarray(image)
    grey = (values >> (bits - 8)).astype(np.uint8)
    tags = getattr(image, "tag_v2", {})
    if tags.get(_PHOTOMETRIC, 1) == _WHITE_IS_ZERO:  # which Pillow leaves as it is for 16 bits
        grey = _WHITE - grey
    transparent = image.info.get("transparency")
    if transparent is None:
        return Decoded(Image.fromarray(grey), (REDUCED,))
    grey[values == transparent] = _WHITE
    return Decoded(Image.fromarray(grey), (TRANSPARENT, REDUCED))


def _without_colour(image: Image.Image, transparent: int | tuple[int, ...]) -> Image.Image:
    """Make white the one colour that is transparent."""
    pixels = np.array(image.convert("RGB" if image.mode == "RGB" else "L"))
    found = pixels == transparent
    pixels[found.all(-1) if pixels.ndim == 3 else found] = _WHITE
    return Image.fromarray(pixels)


def _on_white(image: Image.Image, remarks: tuple[str, ...]) -> Decoded:
    """Lay an image with an alpha channel, or a palette with one, on white."""
    coloured = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    if coloured.getchannel("A").getextrema()[0] == _WHITE:
        return Decoded(coloured.convert("RGB"), remarks)
    background = Image.new("RGBA", coloured.size, (_WHITE,) * 4)
    background.alpha_composite(coloured)
    return Decoded(background.convert("RGB"), (TRANSPARENT, *remarks))
