"""What every tokenizer gives, the one of bytes, and text that comes out while ids are still arriving."""

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
        name: what an index says of it; names the content, too, where there is a file.
        vocabulary: number of ids.
        end: the id that ends a document; None when there is none.
        pieces: the UTF-8 bytes that each id stands for; none for special tokens.
        files: what has to be kept to open it again, by file name.
    """

    name: str
    vocabulary: int
    end: int | None
    pieces: Sequence[bytes]
    files: dict[str, bytes]

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of a text, without special tokens: what looks like one in the text is text."""

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of several texts."""
        return [self.encode(text) for text in texts]

    def encode_array(self, text: str) -> np.ndarray:
        """The ids of a text as an array of integers, (tokens,)."""
        return np.array(self.encode(text), dtype=np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special tokens give none, bytes that are no UTF-8 the replacement character.
        Raises UserError for an id that is none.
        """
        return self.bytes_of(ids).decode(errors="replace")

    def bytes_of(self, ids: Iterable[int]) -> bytes:
        """The bytes of ids, one after the other. Raises UserError for an id that is none."""
        numbers = [int(number) for number in ids]
        outside = next((number for number in numbers if not 0 <= number < self.vocabulary), None)
        if outside is not None:
            raise UserError(f"token {outside} is outside the vocabulary of {self.vocabulary} of {self.name}")
        return b"".join([self.pieces[number] for number in numbers])

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes that each id stands for, int64 (vocabulary,): 0 for special tokens."""
        return np.array([len(piece) for piece in self.pieces], dtype=np.int64)

    def save(self, folder: str | Path) -> None:
        """Write its files, if it has any, into an existing folder. Raises UserError."""
        for name, content in self.files.items():
            try:
                Path(folder, name).write_bytes(content)
            except OSError as error:
                raise UserError(
                    f"{Path(folder, name)} cannot be written ({error.strerror or error})"
                ) from error


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes as they are, 0 to 255, and 256 at the end of a document. Needs no package and no file."""

    def __init__(self) -> None:
        self.name, self.vocabulary, self.end = "bytes", END_OF_DOCUMENT + 1, END_OF_DOCUMENT
        self.pieces = [*(bytes([value]) for value in range(256)), b""]
        self.files = {}

    def encode(self, text: str) -> list[int]:
        """The bytes of a text."""
        return list(text.encode())

    def encode_array(self, text: str) -> np.ndarray:
        """The bytes of a text, uint8 (bytes,)."""
        return np.frombuffer(text.encode(), dtype=np.uint8)


class TextStream:
    """Printable text as ids arrive: a character comes when its last byte has come, never half of it.

    The pieces together are `tokenizer.decode` of all ids, but for a space that sentencepiece puts before the
    first word of a text: in the middle of a text, where a stream begins, it is a real one.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, *ids: int) -> str:
        """The text that these ids complete, perhaps none. Raises UserError for an id that is none."""
        return self._decoder.decode(self._tokenizer.bytes_of(ids))

    def finish(self) -> str:
        """What is left: a replacement character for a character that never became whole. The stream may be
        used anew.
        """
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest
