"""Tokenizers from a tokenizer.json: byte-level BPE (GPT-2 and similar) and sentencepiece."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
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
            self._core = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # noqa: BLE001  the package raises bare Exceptions
            raise DataError(
                address, f"it is no tokenizer.json that can be read ({' '.join(str(error).split())[:200]})"
            ) from error
        self._core.no_truncation()
        self._core.no_padding()
        self._core.encode_special_tokens = True  # <|endoftext|> inside a document is text
        self.name = f"{label} sha256:{hashlib.sha256(content).hexdigest()[:16]}"
        vocabulary = self._core.get_vocab(with_added_tokens=True)
        self.vocabulary = max(vocabulary.values(), default=-1) + 1
        end = _end_token(vocabulary, config, address)
        self.end = None if end is None else vocabulary[end]
        self._adds_space = _adds_space(described)
        self.pieces = self._pieces(vocabulary, described, address)
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end}
        self.files = {FILE_NAME: content} | (
            {} if end is None else {CONFIG_NAME: f"{json.dumps(settings)}\n".encode()}
        )

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        return list(self._core.encode(text, add_special_tokens=False).ids)

    def encode_many(self, texts: Iterable[str]) -> list[list[int]]:
        """Return the ids of several texts, computed on all cores."""
        return [found.ids for found in self._core.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_array(self, text: str) -> np.ndarray:
        """Return the ids of a text, int64 (tokens,)."""
        # encode_batch_fast keeps no offsets.
        (found,) = self._core.encode_batch_fast([text], add_special_tokens=False)
        return np.array(found.ids, dtype=np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids, without the space that encoding put before it."""
        text = super().decode(ids)
        return text.removeprefix(" ") if self._adds_space else text

    def _pieces(
        self, vocabulary: Mapping[str, int], described: Mapping[str, Any], address: str
    ) -> list[bytes]:
        spell = _speller(described, address)
        added = self._core.get_added_tokens_decoder()
        pieces = [b""] * self.vocabulary
        for token, number in vocabulary.items():
            if number == self.end or (number in added and added[number].special):
                continue
            pieces[number] = token.encode() if number in added else spell(token)
        return pieces


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
