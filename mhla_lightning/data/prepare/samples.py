"""Samples on their way into shards: checked against what the index will say of them, and turned into
members. No decoding, no I/O.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from mhla_lightning.data.columns import PADDING
from mhla_lightning.data.index import ShardIndex
from mhla_lightning.data.members import image_extension
from mhla_lightning.errors import DataError

TOKEN_MEMBER_BYTES = 8 * 2**20  # tokens of one member: few enough headers, and still read row by row


@dataclass(frozen=True)
class Sample:
    """One sample to write, or the many samples of a token member.

    name: where it came from, for its key. members: their bytes by extension, in the order of writing. rows:
        samples it counts for.
    """

    name: str
    members: dict[str, bytes]
    rows: int = 1

    @property
    def bytes(self) -> int:
        """Size of the members."""
        return sum(len(data) for data in self.members.values())


def image_sample(header: ShardIndex, name: str, image: bytes, label: int) -> Sample:
    """A JPEG or PNG file and its class number. header: an index of images, for its classes. Raises
    DataError.
    """
    extension = image_extension(image)
    if extension is None:
        raise DataError(f"sample {name} is neither JPEG nor PNG")
    return Sample(name, {"cls": _label(header, name, label), extension: image})


def latent_sample(
    header: ShardIndex,
    name: str,
    latent: np.ndarray,
    *,
    label: int | None = None,
    text: np.ndarray | None = None,
) -> Sample:
    """A latent with its class number or its text features.

    header: an index of latents or video_latents; latent: floats of header.vae.shape, as the VAE gives them,
        neither shifted nor scaled;
    label: where header has classes; text: floats (tokens, channels) where it has none.
    Raises DataError for another shape or type, for NaN and infinite values, and for the wrong condition.
    """
    if header.vae is None or latent.shape != header.vae.shape or latent.dtype.kind != "f":
        raise DataError(
            f"latent {name} is {latent.dtype} {latent.shape}; floats "
            f"{header.vae and header.vae.shape} are needed"
        )
    if (label is None) == bool(header.classes) or (text is None) != bool(header.classes):
        raise DataError(
            f"latent {name} needs {'a label and no text' if header.classes else 'text and no label'}"
        )
    if text is not None and (text.ndim != 2 or text.dtype.kind != "f"):
        raise DataError(
            f"the text of latent {name} is {text.dtype} {text.shape}; floats (tokens, channels) are needed"
        )
    for what, array in (("latent", latent), ("the text of latent", text)):
        if array is not None and not np.isfinite(array).all():
            raise DataError(f"{what} {name} holds NaN or infinite values")
    condition = (
        {"text.npy": npy_bytes(text)} if text is not None else {"cls": _label(header, name, int(label or 0))}
    )
    return Sample(name, {"latent.npy": npy_bytes(latent)} | condition)


def token_samples(
    header: ShardIndex,
    rows: Iterable[tuple[np.ndarray, np.ndarray]],
    vocabulary: int,
    name: str = "tokens",
    member_bytes: int = TOKEN_MEMBER_BYTES,
) -> Iterator[Sample]:
    """Rows of packed sequences, gathered into members of about `member_bytes`.

    header: an index of tokens, for its length. rows: pairs (tokens, documents), each (length,) or (rows,
        length) of integers; documents are the
    number of the document that each token belongs to, from 0 on, PADDING (65535) for places without text, and
    do not fall within a row.
    vocabulary: number of token ids; up to 65,536 a token takes 2 bytes. Raises DataError, naming the row, for
        another shape, ids outside the
    vocabulary, and documents that fall, are negative or above PADDING.
    """
    if not header.length or vocabulary < 1 or vocabulary > 2**32:
        raise DataError(
            f"tokens need a length and a vocabulary from 1 to {2**32}; got length {header.length} "
            f"and vocabulary {vocabulary}"
        )
    dtype = np.dtype("<u2" if vocabulary <= 2**16 else "<u4")
    wanted = max(1, member_bytes // (header.length * dtype.itemsize))
    tokens: list[np.ndarray] = []
    documents: list[np.ndarray] = []
    for row, owners in _single_rows(rows, header.length, vocabulary):
        tokens.append(row.astype(dtype))
        documents.append(owners)
        if len(tokens) == wanted:
            yield _token_sample(name, tokens, documents)
            tokens, documents = [], []
    if tokens:
        yield _token_sample(name, tokens, documents)


def _single_rows(
    rows: Iterable[tuple[np.ndarray, np.ndarray]], length: int, vocabulary: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    number = 0
    for tokens, documents in rows:
        for array, what in ((tokens, "tokens"), (documents, "documents")):
            if (
                array.ndim not in (1, 2)
                or array.shape[-1] != length
                or array.shape != tokens.shape
                or array.dtype.kind not in "iu"
            ):
                raise DataError(
                    f"row {number}: {what} are {array.dtype} {array.shape}; integers ({length},) or "
                    f"(rows, {length}) are needed"
                )
        for row, owner in zip(np.atleast_2d(tokens), np.atleast_2d(documents), strict=True):
            if row.min() < 0 or row.max() >= vocabulary:
                raise DataError(
                    f"row {number} holds token {row.max() if row.min() >= 0 else row.min()}, outside "
                    f"the vocabulary of {vocabulary}"
                )
            if owner[0] < 0 or owner[-1] > PADDING or (owner[1:] < owner[:-1]).any():
                raise DataError(
                    f"row {number}: document numbers must not fall and go from 0 to {PADDING - 1}, "
                    f"or are {PADDING} for padding"
                )
            yield row, owner
            number += 1


def _token_sample(name: str, tokens: list[np.ndarray], documents: list[np.ndarray]) -> Sample:
    owners = np.stack(documents).astype("<u2")
    return Sample(
        name,
        {"tokens.npy": npy_bytes(np.stack(tokens)), "documents.npy": npy_bytes(owners)},
        rows=len(tokens),
    )


def npy_bytes(array: np.ndarray) -> bytes:
    """The bytes of an npy file: little endian, C order, nothing pickled."""
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")), allow_pickle=False)
    return buffer.getvalue()


def _label(header: ShardIndex, name: str, label: int) -> bytes:
    if not 0 <= label < len(header.classes):
        raise DataError(f"sample {name} has label {label}; it must be from 0 to {len(header.classes) - 1}")
    return str(int(label)).encode()
