"""Tokenizers from a tokenizer.json: byte-level BPE (GPT-2 and similar) and sentencepiece."""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np

from mhla_lightning.data.tokenizers.base import Tokenizer
from mhla_lightning.errors import DataError, UserError, missing_extra

FILE_NAME, CONFIG_NAME = "tokenizer.json", "tokenizer_config.json"
# Candidates in this order, where no config names one.
END_TOKENS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>", "[EOS]")
_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")


class FastTokenizer(Tokenizer):
    """The tokenizer of a tokenizer.json, run by the package tokenizers.

    Args:
        content: bytes of tokenizer.json.
        label: first word of its name; the sha256 of its content is the second.
        address: of the file, for messages.
        config: bytes of the tokenizer_config.json beside it, for its eos_token; None tries the usual tokens.

    Raises:
        UserError: the package tokenizers is not installed.
        DataError: no tokenizer.json, or one whose ids have no fixed bytes (WordPiece, for example).
    """

    def __init__(self, content: bytes, label: str, address: str, config: bytes | None = None) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise UserError(
                None, missing_extra("tokenizers", "language", f"the tokenizer {address}")
            ) from error
        try:
            described = json.loads(content)
            self._core = tokenizers.Tokenizer.from_buffer(content.removeprefix(codecs.BOM_UTF8))
            vocabulary = self._core.get_vocab(with_added_tokens=True)
            end = _end_token(vocabulary, config, address)
            if _makes_plain(described, end):
                self._core = tokenizers.Tokenizer.from_buffer(json.dumps(described).encode())
        except DataError:
            raise
        except Exception as error:  # noqa: BLE001  the package raises bare Exceptions
            raise DataError(
                address, f"it is no tokenizer.json that can be read ({' '.join(str(error).split())[:200]})"
            ) from error
        self._core.no_truncation()
        self._core.no_padding()
        self._core.encode_special_tokens = True  # <|endoftext|> inside a document is text
        self.name = f"{label} sha256:{hashlib.sha256(content).hexdigest()[:16]}"
        self.vocabulary = max(vocabulary.values(), default=-1) + 1
        self.end = None if end is None else vocabulary[end]
        self._adds_space = _adds_space(described)
        self._spell = _speller(described, address)
        self._added = self._core.get_added_tokens_decoder()
        unknown = _unknown(described, vocabulary)
        silent = {number for number, token in self._added.items() if token.special} | {self.end}
        self._silent = {number for number in silent if number is not None and number != unknown}
        self._texts = {number: token for token, number in vocabulary.items() if number in self._silent}
        self._spelled: dict[int, list[int]] = {}
        self.pieces = self._pieces(vocabulary)
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end}
        self.files = {FILE_NAME: content} | (
            {} if end is None else {CONFIG_NAME: f"{json.dumps(settings)}\n".encode()}
        )

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        return self._as_text(self._core.encode(text, add_special_tokens=False).ids)

    def encode_many(self, texts: Iterable[str]) -> list[list[int]]:
        """Return the ids of several texts, computed on all cores."""
        batch = self._core.encode_batch_fast(list(texts), add_special_tokens=False)
        return [self._as_text(found.ids) for found in batch]

    def encode_array(self, text: str) -> np.ndarray:
        """Return the ids of a text, int64 (tokens,)."""
        # encode_batch_fast keeps no offsets.
        (found,) = self._core.encode_batch_fast([text], add_special_tokens=False)
        return np.array(self._as_text(found.ids), dtype=np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids, without the space that encoding put before it."""
        text = super().decode(ids)
        return text.removeprefix(" ") if self._adds_space else text

    def _pieces(self, vocabulary: Mapping[str, int]) -> list[bytes]:
        pieces = [b""] * self.vocabulary
        for token, number in vocabulary.items():
            if number == self.end or (number in self._added and self._added[number].special):
                continue
            pieces[number] = token.encode() if number in self._added else self._spell(token)
        return pieces

    def _as_text(self, ids: list[int]) -> list[int]:
        """Return ids without special tokens, which are replaced by the ids of their letters.

        Unigram models know </s> as a word, and so do BPE models that look up whole words.
        """
        if self._silent.isdisjoint(ids):
            return ids
        return [part for number in ids for part in self._letters(number)]

    def _letters(self, number: int) -> list[int]:
        if number not in self._silent:
            return [number]
        if number not in self._spelled:
            text = self._texts[number]
            found = _cover(self._spell(text), self._plain_pieces)
            if found is None:
                raise UserError(
                    "tokenizer",
                    f"{self.name} can write the text '{text}' by its special token alone, which would end a "
                    "document or vanish; choose another eos_token in tokenizer_config.json",
                )
            self._spelled[number] = found
        return self._spelled[number]

    @cached_property
    def _plain_pieces(self) -> dict[bytes, int]:
        found: dict[bytes, int] = {}
        for number, piece in enumerate(self.pieces):
            if piece and number not in self._added:
                found.setdefault(piece, number)
        return found


def _makes_plain(described: dict[str, Any], end: str | None) -> bool:
    """Change a description so that no text vanishes; return whether anything changed.

    An end token that is listed as not special would be read out of a text. Added tokens with lstrip or rstrip
    swallow the blanks beside them.
    """
    changed = False
    for token in described.get("added_tokens") or ():
        wanted = {"special": True} if token["content"] == end else {"lstrip": False, "rstrip": False}
        if not token.get("special") and any(token.get(name) != value for name, value in wanted.items()):
            token.update(wanted)
            changed = True
    return changed


def _unknown(described: Mapping[str, Any], vocabulary: Mapping[str, int]) -> int | None:
    """Return the id of what the model does not know, which is no text of its own."""
    model = described["model"]
    named = model.get("unk_token")
    return model.get("unk_id") if named is None else vocabulary.get(named)


def _cover(wanted: bytes, pieces: Mapping[bytes, int]) -> list[int] | None:
    """Return the fewest pieces whose bytes are the wanted ones; None where there are none."""
    best: list[list[int] | None] = [[]]
    for stop in range(1, len(wanted) + 1):
        found = [
            [*before, pieces[wanted[start:stop]]]
            for start, before in enumerate(best)
            if before is not None and wanted[start:stop] in pieces
        ]
        best.append(min(found, key=len, default=None))
    return best[-1]


def _speller(described: Mapping[str, Any], address: str) -> Callable[[str], bytes]:
    """Return the function from a token of the model to its bytes."""
    decoders = list(_steps(described.get("decoder")))
    if any(step["type"] == "ByteLevel" for step in (*decoders, *_steps(described.get("pre_tokenizer")))):
        return _spell_byte_level
    spaces = [step.get("replacement") for step in decoders if step["type"] == "Metaspace"]
    spaces += [
        (step.get("pattern") or {}).get("String")
        for step in decoders
        if step["type"] == "Replace" and step.get("content") == " "
    ]
    if not spaces or not isinstance(spaces[0], str):
        kinds = ", ".join(step["type"] for step in decoders) or "none"
        raise DataError(
            address,
            f"its decoder {kinds} gives an id no fixed bytes; byte-level BPE or sentencepiece is needed",
        )
    space = spaces[0]

    def spell(token: str) -> bytes:
        byte = _BYTE_TOKEN.fullmatch(token)
        return bytes([int(byte[1], 16)]) if byte else token.replace(space, " ").encode()

    return spell


def _steps(part: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """Yield a normalizer, pre-tokenizer or decoder, or those of a sequence."""
    if part is None:
        return
    if part["type"] != "Sequence":
        yield part
    for inner in (
        step for name in ("normalizers", "pretokenizers", "decoders") for step in part.get(name) or ()
    ):
        yield from _steps(inner)


def _adds_space(described: Mapping[str, Any]) -> bool:
    if any(step["type"] == "Prepend" for step in _steps(described.get("normalizer"))):
        return True
    steps = list(_steps(described.get("pre_tokenizer")))
    return any(
        (step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never")
        or (step["type"] == "ByteLevel" and step.get("add_prefix_space", True))
        for step in steps
    )


def _end_token(vocabulary: Mapping[str, int], config: bytes | None, address: str) -> str | None:
    try:
        named = json.loads(config).get("eos_token") if config is not None else None
    except (ValueError, AttributeError) as error:
        raise DataError(address, f"the {CONFIG_NAME} beside it is no JSON object ({error})") from error
    end = named.get("content") if isinstance(named, dict) else named
    return next((token for token in ((end,) if end is not None else END_TOKENS) if token in vocabulary), None)


def _byte_alphabet() -> dict[str, int]:
    """Return GPT-2's characters for bytes.

    Printable Latin-1 stays as it is; the other bytes follow from U+0100 on.
    """
    itself = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in itself]
    return {chr(byte): byte for byte in itself} | {
        chr(0x100 + place): byte for place, byte in enumerate(others)
    }


_BYTES = _byte_alphabet()


def _spell_byte_level(token: str) -> bytes:
    if all(letter in _BYTES for letter in token):
        return bytes(_BYTES[letter] for letter in token)
    return token.encode()  # as the package decodes it
