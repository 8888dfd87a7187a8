"""Samples on their way into shards: checked against the index and turned into members.

Nothing here decodes data or opens files.
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

    Args:
        name: where the sample came from; part of its key.
        members: bytes by extension, in the order of writing.
        rows: number of samples that it counts for.
        remarks: what training will do to it that a user may not expect; counted while shards are written.
    """

    name: str
    members: dict[str, bytes]
    rows: int = 1
    remarks: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """Size of the members."""
        return sum(len(data) for data in self.members.values())


def image_sample(
    header: ShardIndex, name: str, image: bytes, label: int, caption: str | None = None
) -> Sample:
    """Make a sample of a JPEG, PNG or WebP file, its class number and perhaps its caption.

    Args:
        header: an index of images; its classes bound the label.
        name: where the image came from.
        image: content of the file.
        label: class number.
        caption: text; None leaves it out.

    Raises:
        DataError: another format, or a label that is no class.
    """
    extension = image_extension(image)
    if extension is None:
        raise DataError(name, "it is neither JPEG, PNG nor WebP")
    text = {} if caption is None else {"txt": caption.encode()}
    return Sample(name, {"cls": _label(header, name, label), **text, extension: image})


def latent_sample(
    header: ShardIndex,
    name: str,
    latent: np.ndarray,
    *,
    label: int | None = None,
    text: np.ndarray | None = None,
    caption: str | None = None,
) -> Sample:
    """Make a sample of a latent with its class number or its text features.

    Args:
        header: an index of latents or video_latents.
        name: where the latent came from.
        latent: floats of header.vae.shape, as the VAE gives them, neither shifted nor scaled.
        label: class number; None where the header has no classes.
        text: floats (tokens, channels); None where the header has classes.
        caption: that the features are of, for people who look at the sample; None leaves it out.

    Raises:
        DataError: another shape or type, NaN or infinite values, or the wrong condition.
    """
    if header.vae is None or latent.shape != header.vae.shape or latent.dtype.kind != "f":
        raise DataError(
            name,
            f"the latent is {latent.dtype} {latent.shape}; floats "
            f"{header.vae and header.vae.shape} are needed",
        )
    if (label is None) == bool(header.classes) or (text is None) != bool(header.classes):
        raise DataError(
            name, f"the latent needs {'a label and no text' if header.classes else 'text and no label'}"
        )
    if text is not None and (text.ndim != 2 or text.dtype.kind != "f"):
        raise DataError(
            name, f"the text features are {text.dtype} {text.shape}; floats (tokens, channels) are needed"
        )
    for what, array in (("latent holds", latent), ("text features hold", text)):
        if array is not None and not np.isfinite(array).all():
            raise DataError(name, f"the {what} NaN or infinite values")
    condition = (
        {"text.npy": npy_bytes(text)} if text is not None else {"cls": _label(header, name, int(label or 0))}
    )
    shown = {} if caption is None else {"txt": caption.encode()}
    return Sample(name, {"latent.npy": npy_bytes(latent)} | condition | shown)


def token_samples(
    header: ShardIndex,
    rows: Iterable[tuple[np.ndarray, np.ndarray]],
    vocabulary: int,
    name: str = "tokens",
    member_bytes: int = TOKEN_MEMBER_BYTES,
) -> Iterator[Sample]:
    """Gather rows of packed sequences into members of about `member_bytes`.

    Args:
        header: an index of tokens; its length is the tokens a row.
        rows: pairs (tokens, documents), each integers (length,) or (rows, length). A document number tells
            which document a token belongs to, from 0 on; PADDING (65535) marks places without text. Numbers
            do not fall within a row.
        vocabulary: number of token ids; up to 65,536 a token takes 2 bytes.
        name: where the rows came from.
        member_bytes: size of a member.

    Raises:
        DataError: another shape, ids outside the vocabulary, or document numbers that fall, are negative or
            above PADDING. The key names the row.
    """
    if not header.length or vocabulary < 1 or vocabulary > 2**32:
        raise DataError(
            "header" if not header.length else "vocabulary",
            f"tokens need a length and a vocabulary from 1 to {2**32}; got length {header.length} "
            f"and vocabulary {vocabulary}",
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
                    f"row {number}",
                    f"its {what} are {array.dtype} {array.shape}; integers ({length},) or (rows, "
                    f"{length}) are needed",
                )
        for row, owner in zip(np.atleast_2d(tokens), np.atleast_2d(documents), strict=True):
            if row.min() < 0 or row.max() >= vocabulary:
                raise DataError(
                    f"row {number}",
                    f"token {row.max() if row.min() >= 0 else row.min()} is outside the vocabulary of "
                    f"{vocabulary}",
                )
            if owner[0] < 0 or owner[-1] > PADDING or (owner[1:] < owner[:-1]).any():
                raise DataError(
                    f"row {number}",
                    f"document numbers must go from 0 to {PADDING - 1} without falling, or be {PADDING} "
                    "for padding",
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
    """Return the bytes of an npy file: little endian, C order, nothing pickled."""
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")), allow_pickle=False)
    return buffer.getvalue()


def _label(header: ShardIndex, name: str, label: int) -> bytes:
    if not 0 <= label < len(header.classes):
        raise DataError(name, f"label {label} is no class; it must be from 0 to {len(header.classes) - 1}")
    return str(int(label)).encode()
