"""The interface of tokenizers, the tokenizer of bytes, and text from a stream of ids."""

from __future__ import annotations

import codecs
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from mhla_lightning.errors import UserError

END_OF_DOCUMENT = 256  # of the bytes tokenizer


class Tokenizer(ABC):
    """Text to ids and back.

    Attributes:
        name: as in an index; with a file, it includes a hash of the content.
        vocabulary: number of ids.
        end: id that ends a document; None when there is none.
        pieces: UTF-8 bytes of each id; empty for special tokens.
        files: content of the files that open it again, by file name.
    """

    name: str
    vocabulary: int
    end: int | None
    pieces: Sequence[bytes]
    files: dict[str, bytes]

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Return the ids of a text; a special token in the text counts as text."""

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of several texts."""
        return [self.encode(text) for text in texts]

    def encode_array(self, text: str) -> np.ndarray:
        """Return the ids of a text as an array of integers, (tokens,)."""
        return np.array(self.encode(text), dtype=np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids, without special tokens. Raises UserError for an unknown id.

        Bytes that are no UTF-8 become the replacement character.
        """
        return self.bytes_of(ids).decode(errors="replace")

    def bytes_of(self, ids: Iterable[int]) -> bytes:
        """Return the concatenated bytes of ids. Raises UserError for an unknown id."""
        numbers = [int(number) for number in ids]
        outside = next((number for number in numbers if not 0 <= number < self.vocabulary), None)
        if outside is not None:
            raise UserError(
                "ids", f"token {outside} is outside the vocabulary of {self.vocabulary} of {self.name}"
            )
        return b"".join([self.pieces[number] for number in numbers])

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """Number of UTF-8 bytes of each id, int64 (vocabulary,); 0 for special tokens."""
        return np.array([len(piece) for piece in self.pieces], dtype=np.int64)

    def save(self, folder: str | Path) -> None:
        """Write its files, if it has any, into an existing folder. Raises UserError."""
        for name, content in self.files.items():
            try:
                Path(folder, name).write_bytes(content)
            except OSError as error:
                raise UserError(
                    str(Path(folder, name)), f"it cannot be written ({error.strerror or error})"
                ) from error


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes as ids 0 to 255, and 256 at the end of a document.

    Needs no package and no file.
    """

    def __init__(self) -> None:
        self.name, self.vocabulary, self.end = "bytes", END_OF_DOCUMENT + 1, END_OF_DOCUMENT
        self.pieces = [*(bytes([value]) for value in range(256)), b""]
        self.files = {}

    def encode(self, text: str) -> list[int]:
        """Return the bytes of a text."""
        return list(text.encode())

    def encode_array(self, text: str) -> np.ndarray:
        """Return the bytes of a text, uint8 (bytes,)."""
        return np.frombuffer(text.encode(), dtype=np.uint8)


class TextStream:
    """Text from a stream of ids; each character appears whole, with its last byte.

    The pieces together equal `tokenizer.decode` of all ids, except for a space that sentencepiece puts before
    the first word of a text. A stream begins in the middle of a text, where this space is real.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, *ids: int) -> str:
        """Return the text that these ids complete, perhaps empty.

        Raises UserError for an unknown id.
        """
        return self._decoder.decode(self._tokenizer.bytes_of(ids))

    def finish(self) -> str:
        """Return the rest: a replacement character for an incomplete character. Resets the stream."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest
