"""Features of captions, computed once for each text and kept beside the shards."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mhla_lightning.data.encoders.text_encoders import TextEncoder, load_text_encoder
from mhla_lightning.data.index import ShardIndex, TextEncoding
from mhla_lightning.data.prepare.latents.devices import DTYPES, own_device, release_devices
from mhla_lightning.data.prepare.parallel import run_jobs
from mhla_lightning.data.prepare.replacing import Building, Note, sync
from mhla_lightning.data.prepare.samples import npy_bytes
from mhla_lightning.errors import DataError, UserError, unknown_name

LONG = ("refuse", "cut")  # what to do with captions that are too long
_TOGETHER = 32  # captions of a job
_WORDS_OF_A_CAPTION = 64  # a guess, for the size of shards


@dataclass(frozen=True)
class CaptionFeatures:
    """Features of captions in files, float16 (rows, channels) each. Can be pickled.

    Args:
        folder: of the files.
    """

    folder: Path

    def path(self, caption: str) -> Path:
        """Return the file of a caption."""
        digest = hashlib.sha256(caption.encode()).hexdigest()
        return self.folder / digest[:2] / f"{digest}.npy"

    def holds(self, caption: str) -> bool:
        """Return whether a caption was encoded; a damaged file counts as none."""
        try:
            self.read(caption)
        except (OSError, ValueError, EOFError):
            return False
        return True

    def read(self, caption: str) -> np.ndarray:
        """Return the features of a caption that was encoded."""
        return np.load(self.path(caption), allow_pickle=False)

    def write(self, caption: str, rows: np.ndarray) -> None:
        """Write the features of a caption whole, or not at all."""
        path = self.path(caption)
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f"{uuid.uuid4().hex}.new")
        new.write_bytes(npy_bytes(rows))
        sync(new)
        new.rename(path)


@dataclass(frozen=True)
class EncodedTexts:
    """Features of all captions of a target, and of the empty text.

    The empty text replaces a caption that training drops.

    Args:
        features: of the captions.
        empty: content of the file with the features of the empty text.
    """

    features: CaptionFeatures
    empty: bytes

    def described(self, header: ShardIndex) -> ShardIndex:
        """Return an index that names these features of the empty text."""
        assert header.text is not None
        return replace(header, text=replace(header.text, empty=hashlib.sha256(self.empty).hexdigest()))


def check_text_options(tokens: int | None, long_captions: str) -> None:
    """Raise UserError for a number of tokens below 1, or a name that is not in LONG."""
    if tokens is not None and tokens < 1:
        raise UserError("tokens", f"got {tokens}; it must be at least 1")
    if long_captions not in LONG:
        raise UserError("long_captions", unknown_name("choice", long_captions, LONG))


def describe_text(name: str, tokens: int | None, dtype: str, instruction: str | None = None) -> TextEncoding:
    """Describe the encoder of captions.

    Args:
        name: see text_encoders.load_text_encoder, also for the instruction.
        tokens: the most of a caption; None is the encoder's.
        dtype: of devices.DTYPES.
        instruction: what it reads before a caption.

    Raises:
        UserError: an encoder that cannot be opened.
    """
    found = load_text_encoder(name, dtype=DTYPES[dtype], instruction=instruction).encoding
    return found if tokens is None else replace(found, tokens=tokens)


def text_bytes(text: TextEncoding) -> int:
    """Return roughly the bytes of a caption's features."""
    return min(text.tokens, _WORDS_OF_A_CAPTION) * text.channels * 2


def text_packages(text: TextEncoding) -> list[str]:
    """Return the packages whose versions decide the features of captions."""
    return [] if text.name.startswith("words:") else ["transformers"]


class CaptionJob(NamedTuple):
    """Captions to encode.

    Args:
        building: of the target.
        features: that are kept.
        encoding: which text encoder, and how many tokens.
        cut: leave out the tokens that are too many.
        dtype: of devices.DTYPES.
        devices: see devices.find_devices.
        captions: (sample that the caption was first found at, caption).
    """

    building: Building
    features: CaptionFeatures
    encoding: TextEncoding
    cut: bool
    dtype: str
    devices: tuple[str, ...]
    captions: list[tuple[str, str]]


def encode_captions(
    building: Building,
    captions: Mapping[str, str],
    encoding: TextEncoding,
    cut: bool,
    dtype: str,
    devices: tuple[str, ...],
    on_captions: Callable[[int, int], None],
    on_note: Note,
) -> EncodedTexts:
    """Encode the captions that were not encoded before, and the empty text.

    Args:
        building: of the target.
        captions: caption -> the sample that it was first found at.
        encoding: which text encoder, and how many tokens.
        cut: leave out the tokens that are too many.
        dtype: of devices.DTYPES.
        devices: see devices.find_devices.
        on_captions: called with the number of captions done, and of all.
        on_note: called with a remark on captions that are cut.

    Raises:
        DataError: a text that is too long; the key names the sample.
    """
    features = CaptionFeatures(building.folder / "features")
    captions = {"": "of the empty text", **captions}
    missing = [(sample, text) for text, sample in captions.items() if not features.holds(text)]
    done = len(captions) - len(missing)
    if missing:
        _check_lengths(missing, load_text_encoder(encoding, dtype=DTYPES[dtype]), cut, on_note)

    def jobs() -> Iterator[CaptionJob]:
        for start in range(0, len(missing), _TOGETHER):
            part = missing[start : start + _TOGETHER]
            yield CaptionJob(building, features, encoding, cut, dtype, devices, part)

    on_captions(done, len(captions))
    try:
        with closing(run_jobs(_encode, jobs(), len(devices))) as results:
            for count in results:
                done += count
                on_captions(done, len(captions))
    finally:
        _opened.cache_clear()  # the VAE needs the memory
        release_devices()
    return EncodedTexts(features, features.path("").read_bytes())


def _check_lengths(
    captions: Sequence[tuple[str, str]], encoder: TextEncoder, cut: bool, on_note: Note
) -> None:
    """Find captions that are too long, before the first is encoded.

    Raises:
        DataError: there are some, and they are not cut; the key names the first sample.
    """
    most, name = encoder.encoding.tokens, encoder.encoding.name
    lengths = [(sample, encoder.length(text)) for sample, text in captions if text]
    long = [(sample, length) for sample, length in lengths if length > most]
    if not long:
        return
    sample, length = long[0]
    count = f"{len(long)} of {len(lengths)} captions have more than the {most} tokens that {name} takes"
    if not cut:
        raise DataError(
            f"sample {sample}",
            f"its caption has {length} tokens, and {count}: shorten them, raise `tokens`, or cut them with "
            "`long_captions`",
        )
    on_note(f"{count}, and are cut; the first is of {sample}, with {length}")


def _encode(job: CaptionJob) -> int:
    encoder = _opened(job.encoding, own_device(job.building.folder, job.devices), job.dtype)
    for sample, text in job.captions:
        try:
            (rows,) = encoder.encode([text], job.cut)
        except UserError as error:
            raise DataError(f"sample {sample}", error.reason) from error
        with np.errstate(over="ignore"):
            stored = rows.numpy().astype("<f2")
        if not np.isfinite(stored).all():
            raise DataError(
                f"sample {sample}",
                "the features of its caption hold NaN or values that float16 does not reach",
            )
        job.features.write(text, stored)
    return len(job.captions)


@lru_cache(maxsize=1)
def _opened(encoding: TextEncoding, device: str, dtype: str) -> TextEncoder:
    return load_text_encoder(encoding, device, DTYPES[dtype])
