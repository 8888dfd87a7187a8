"""Samples to look at: a sheet of images, latents or clips, or documents of token rows."""

from __future__ import annotations

import io
import math
import random
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mhla_lightning.data.columns import PADDING
from mhla_lightning.data.index import INDEX_NAME, ShardIndex, read_index
from mhla_lightning.data.kinds import Kind, kind_of
from mhla_lightning.data.members import RawSample
from mhla_lightning.data.prepare.places import find_splits
from mhla_lightning.data.skips import BadSample
from mhla_lightning.data.split import Split
from mhla_lightning.data.stores import Remote, with_cache
from mhla_lightning.data.stores.retry import NoRanges
from mhla_lightning.data.tokenizers import Tokenizer, tokenizer_of
from mhla_lightning.errors import DataError, UserError

PICTURES, ROWS = 64, 4  # shown by default
TILE = 128  # pixels of the longer side of a picture
_CAPTION, _GAP = 16, 6
_FRAMES = 4  # of a clip, evenly over its time
_SHOWN_TOKENS = 400  # of one document


@dataclass(frozen=True)
class Preview:
    """Samples of a split, ready to show.

    Args:
        kind: of the split.
        split: its name.
        shown: number of samples shown.
        samples: number of samples in the split.
        png: a sheet of pictures; None for tokens.
        texts: a text for each row of tokens.
        unusable: samples among those shown that could not be decoded.
    """

    kind: str
    split: str
    shown: int
    samples: int
    png: bytes | None = None
    texts: tuple[str, ...] = ()
    unusable: int = 0


def preview(
    path: str, split: str | None = None, count: int | None = None, seed: int | None = None
) -> Preview:
    """Look at samples of a split.

    Args:
        path: folder or address of a data set or of a split.
        split: of the data set; None is train, or the first that exists.
        count: samples to show; None is 64 pictures, or 4 rows of tokens.
        seed: choose samples at random; None takes them evenly over the split, of tokens the first rows.

    Raises:
        UserError: a count below 1.
        DataError: a split that is missing or cannot be read.
    """
    if count is not None and count < 1:
        raise UserError("count", f"got {count}; it must be at least 1")
    name, store = next(iter(find_splits(path, None if split is None else [split]).items()))
    index = read_index(store)
    if not index.samples:
        raise DataError(store.address(INDEX_NAME), "lists no samples: the split is empty")
    rows = index.kind == "tokens"
    chosen = choose(index.samples, count or (ROWS if rows else PICTURES), seed, first=rows)
    tokenizer = _tokenizer(path, index) if rows else None
    try:
        return _look(name, Split(index, store), chosen, tokenizer)
    except NoRanges:  # the server sends whole files only
        with tempfile.TemporaryDirectory(prefix="mhla-preview-") as folder:
            files = {shard.name: (shard.sha256, shard.bytes) for shard in index.shards}
            return _look(
                name, Split(index, with_cache(store, files, Remote(cache_dir=folder))), chosen, tokenizer
            )


def _tokenizer(path: str, index: ShardIndex) -> Tokenizer | None:
    """Return the tokenizer of a data set, or of a split's data set; None without one."""
    for folder in (
        path,
        f"{path.rstrip('/')}/.." if "://" not in path else path.rstrip("/").rpartition("/")[0],
    ):
        with suppress(UserError):
            return tokenizer_of(folder, index)
    return None


def _look(name: str, data: Split, chosen: Sequence[int], tokenizer: Tokenizer | None) -> Preview:
    index, kind = data.index, kind_of(data.index)
    if index.kind == "tokens":
        return Preview(
            index.kind,
            name,
            len(chosen),
            index.samples,
            texts=tuple(_row_text(kind, data, sample, tokenizer) for sample in chosen),
        )
    tiles, unusable = [], 0
    for sample in chosen:
        pictures, caption, good = _tile(kind, data, sample)
        tiles.append((pictures, caption))
        unusable += not good
    buffer = io.BytesIO()
    preview_sheet(tiles).save(buffer, format="PNG")
    return Preview(index.kind, name, len(chosen), index.samples, png=buffer.getvalue(), unusable=unusable)


def choose(samples: int, count: int, seed: int | None, first: bool = False) -> list[int]:
    """Choose samples: at random, or evenly from the first on, or the first ones."""
    count = min(samples, count)
    if seed is not None:
        return sorted(random.Random(seed).sample(range(samples), count))
    return list(range(count)) if first else [samples * number // count for number in range(count)]


def preview_sheet(tiles: Sequence[tuple[Sequence[Image.Image], str]]) -> Image.Image:
    """Draw tiles in rows, about as wide as high.

    Args:
        tiles: one or more pictures side by side, and the caption below them.
    """
    pictures = max(len(found) for found, _ in tiles)
    width, height = pictures * TILE + _GAP, TILE + _CAPTION + _GAP
    columns = max(1, min(len(tiles), round(math.sqrt(len(tiles) * height / width))))
    rows = math.ceil(len(tiles) / columns)
    sheet = Image.new("RGB", (columns * width + _GAP, rows * height + _GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for number, (found, caption) in enumerate(tiles):
        left, top = _GAP + number % columns * width, _GAP + number // columns * height
        for place, picture in enumerate(found):
            fitted = _fitted(picture)
            sheet.paste(
                fitted, (left + place * TILE + (TILE - fitted.width) // 2, top + (TILE - fitted.height) // 2)
            )
        draw.text(
            (left, top + TILE + 1), _shortened(caption, draw, font, width - _GAP), fill="black", font=font
        )
    return sheet


def latent_pictures(latent: np.ndarray) -> list[Image.Image]:
    """Draw the first three channels of a latent as colours, of a video three frames.

    They are its first, middle and last frame. Each channel is scaled from its 1st to its 99th percentile.

    Args:
        latent: floats (C, h, w) or (C, t, h, w).
    """
    video = latent[:, None] if latent.ndim == 3 else latent
    frames = sorted({0, video.shape[1] // 2, video.shape[1] - 1})
    colours = video[:3, frames].astype(np.float32)
    colours = colours[[0, 1, 2]] if len(colours) == 3 else colours[[0, 0, 0]]
    low, high = (np.percentile(colours, share, axis=(1, 2, 3), keepdims=True) for share in (1, 99))
    scaled = np.clip((colours - low) / np.maximum(high - low, 1e-6), 0, 1)
    return [Image.fromarray((frame * 255).astype(np.uint8)) for frame in scaled.transpose(1, 2, 3, 0)]


def clip_pictures(clip: np.ndarray) -> list[Image.Image]:
    """Draw four frames of a clip, from the first to the last, or as many as there are.

    Args:
        clip: uint8 (frames, height, width, 3).
    """
    chosen = sorted({round(place) for place in np.linspace(0, len(clip) - 1, _FRAMES)})
    return [Image.fromarray(clip[number]) for number in chosen]


def _tile(kind: Kind, data: Split, sample: int) -> tuple[list[Image.Image], str, bool]:
    try:
        raw = kind.read(data, [sample])[0]
        found = kind.inspect(raw)
    except BadSample:
        return [_unreadable()], f"{sample}: unusable", False
    if isinstance(found, tuple):
        image, label = found
        shown = _class_name(data.index, label) if data.index.classes else _caption(raw)
        return [image], f"{sample}: {shown}", True
    assert isinstance(found, dict)
    if "clip" in found:
        return clip_pictures(found["clip"]), f"{sample}: {_one_line(str(found['caption']))}", True
    if "label" in found:
        shown = _class_name(data.index, int(found["label"]))
    else:
        shown = _caption(raw) or f"text {found['text'].shape}"
    return latent_pictures(found["latent"]), f"{sample}: {shown}", True


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _caption(raw: RawSample) -> str:
    """Return the member txt of a sample in one line, empty without one."""
    return _one_line(raw.get("txt", b"").decode(errors="replace"))


def _class_name(index: ShardIndex, label: int) -> str:
    return index.classes[label]


def _row_text(kind: Kind, data: Split, sample: int, tokenizer: Tokenizer | None) -> str:
    try:
        found = kind.inspect(kind.read(data, [sample])[0])
    except BadSample as error:
        return f"row {sample}: unusable ({error})"
    assert isinstance(found, tuple)
    tokens, documents = found
    text = int(np.searchsorted(documents, PADDING))
    starts = [0, *(int(place) + 1 for place in np.flatnonzero(np.diff(documents[:text]))), text]
    pieces = [
        f"  document {documents[start]} ({stop - start} tokens): {_spelled(tokens[start:stop], tokenizer)}"
        for start, stop in zip(starts, starts[1:], strict=False)
        if start < stop
    ]
    padding = [f"  padding ({len(tokens) - text} tokens)"] if text < len(tokens) else []
    return "\n".join([f"row {sample}: {len(tokens)} tokens of {len(pieces)} documents", *pieces, *padding])


def _spelled(tokens: np.ndarray, tokenizer: Tokenizer | None) -> str:
    """Write tokens as text, or as numbers where there is no tokenizer.

    Ids without text, such as an end of document, become <number>.
    """
    shown = tokens[: _SHOWN_TOKENS if tokenizer else _SHOWN_TOKENS // 8].tolist()
    more = " ..." if len(tokens) > len(shown) else ""
    if tokenizer is None:
        return " ".join(map(str, shown)) + more
    known = [tokenizer.pieces[token] if token < tokenizer.vocabulary else b"" for token in shown]
    encoded = b"".join(piece or f"<{token}>".encode() for piece, token in zip(known, shown, strict=True))
    text = "".join(
        letter if letter.isprintable() or letter in "\n\t" else "\N{REPLACEMENT CHARACTER}"
        for letter in encoded.decode(errors="replace")
    )
    return text.replace("\n", "\n    ") + more


def _fitted(picture: Image.Image) -> Image.Image:
    """Resize a picture so that its longer side has TILE pixels.

    Small pictures are enlarged without smoothing, so that single pixels show.
    """
    factor = TILE / max(picture.size)
    size = max(1, round(picture.width * factor)), max(1, round(picture.height * factor))
    return picture.resize(size, Image.Resampling.NEAREST if factor > 1 else Image.Resampling.LANCZOS)


def _unreadable() -> Image.Image:
    tile = Image.new("RGB", (TILE, TILE), "lightgray")
    ImageDraw.Draw(tile).line((0, 0, TILE, TILE), fill="red", width=3)
    return tile


def _shortened(
    caption: str, draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int
) -> str:
    if draw.textlength(caption, font=font) <= width:
        return caption
    while caption and draw.textlength(f"{caption}...", font=font) > width:
        caption = caption[:-1]
    return f"{caption}..."
