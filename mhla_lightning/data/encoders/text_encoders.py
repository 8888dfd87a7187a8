"""Text to features for cross-attention: `words:N`, umT5 (SPEC 6.2, 6.6) and SANA's Gemma-2."""

from __future__ import annotations

import hashlib
import html
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mhla_lightning.data.encoders.instructions import instruction_text
from mhla_lightning.data.encoders.transformers_models import (
    PretrainedModel,
    content_hash,
    open_config,
    open_tokenizer,
    open_weights,
)
from mhla_lightning.data.encoders.vaes import default_dtype
from mhla_lightning.data.index import TextEncoding
from mhla_lightning.errors import UserError, missing_extra
from mhla_lightning.randomness import philox

__all__ = ["TextEncoder", "TextEncoding", "clean", "load_text_encoder", "pad_rows", "text_sha256"]

DEFAULT_TOKENS = 512  # of Wan2.1, and of words
_WORDS = re.compile(r"words:(\d{1,5})")
_EMPTY = " "  # stands in for a word in a text without words; no word equals it
_SHOWN = 80  # characters of a text in a message


class TextEncoder(ABC):
    """An encoder from texts to features.

    Every text is encoded alone, so its features do not depend on the other texts.

    Attributes:
        encoding: its description, with its sha256.
    """

    encoding: TextEncoding

    def encode(self, texts: Sequence[str], cut: bool = False) -> list[Tensor]:
        """Return the features of each text, float32 (rows, channels), 1 <= rows <= tokens.

        They are on the CPU.

        Args:
            texts: to encode.
            cut: leave out the tokens that are too many.

        Raises UserError for a text with more rows, which is not cut.
        """
        return [self.rows(clean(text), cut) for text in texts]

    def length(self, text: str) -> int:
        """Return the rows that a text has, if they are not too many."""
        return self.count(clean(text))

    @abstractmethod
    def rows(self, text: str, cut: bool = False) -> Tensor:
        """Return the features of a cleaned text, float32 (rows, channels)."""

    @abstractmethod
    def count(self, text: str) -> int:
        """Return the rows of a cleaned text."""

    def _demand_short(self, text: str, rows: int) -> None:
        if rows > self.encoding.tokens:
            shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
            limit = f"{self.encoding.name} takes at most {self.encoding.tokens}"
            raise UserError(
                "texts",
                f"{shown!r} has {rows} tokens, and {limit}: shorten it, or raise the text encoder's tokens",
            )


class Words(TextEncoder):
    """A fixed vector of independent unit Gaussians for each lower-cased word, without weights.

    A text without words has one row, with a vector of its own.
    """

    def __init__(self, encoding: TextEncoding) -> None:
        self.encoding = encoding

    def rows(self, text: str, cut: bool = False) -> Tensor:
        """Return one row for each word."""
        words = _words(text)
        if cut:
            words = words[: self.encoding.tokens]
        self._demand_short(text, len(words))
        return torch.from_numpy(np.stack([_word_vector(word, self.encoding.channels) for word in words]))

    def count(self, text: str) -> int:
        return len(_words(text))


class TokenEncoder(TextEncoder):
    """A model of transformers with its tokenizer; each token, special ones included, is a row."""

    def __init__(self, encoding: TextEncoding, model: nn.Module, tokenizer: Any) -> None:
        self.encoding, self.model, self.tokenizer = encoding, model, tokenizer

    @torch.no_grad()
    def rows(self, text: str, cut: bool = False) -> Tensor:
        """Return the last hidden state of all tokens."""
        tokens = self._tokens(text, self.encoding.tokens if cut else None)
        self._demand_short(text, tokens.shape[1])  # attention over a whole book would take all memory
        return self._hidden(tokens)

    def count(self, text: str) -> int:
        return self._tokens(text).shape[1]

    def _tokens(self, text: str, most: int | None = None) -> Tensor:
        """Return the tokens of a text, special ones included, (1, rows).

        Args:
            text: to encode.
            most: rows, where the tokens that are too many are left out.
        """
        cut = {} if most is None else {"truncation": True, "max_length": most}
        return self.tokenizer(text, add_special_tokens=True, return_tensors="pt", **cut).input_ids

    def _hidden(self, tokens: Tensor) -> Tensor:
        """Return the last hidden state of tokens (1, rows), float32 (rows, channels) on the CPU."""
        device = next(self.model.parameters()).device
        return self.model(input_ids=tokens.to(device)).last_hidden_state[0].float().cpu()


class UMT5(TokenEncoder):
    """The encoder of umT5, as Wan2.1 has it."""


class Gemma2(TokenEncoder):
    """The decoder Gemma-2 as SANA has it: the last hidden state of the lower-cased text.

    It may read an instruction before the text. Then the rows are those of the first token, of the
    instruction's last token and of the text, as diffusers' SanaPipeline selects them. The empty text, which
    guidance compares with, is read without an instruction.
    """

    @torch.no_grad()
    def rows(self, text: str, cut: bool = False) -> Tensor:
        text = text.lower()
        if not self._instructed(text):
            return super().rows(text, cut)
        start = self._start()
        tokens = self._tokens(self._before + text, start + self.encoding.tokens - 1 if cut else None)
        self._demand_short(text, 1 + tokens.shape[1] - start)
        hidden = self._hidden(tokens)
        return torch.cat([hidden[:1], hidden[start:]])

    def count(self, text: str) -> int:
        text = text.lower()
        if not self._instructed(text):
            return super().count(text)
        return 1 + self._tokens(self._before + text).shape[1] - self._start()

    def _instructed(self, text: str) -> bool:
        return self.encoding.instruction is not None and bool(text)

    @property
    def _before(self) -> str:
        return instruction_text(str(self.encoding.instruction))

    def _start(self) -> int:
        """Return the place of the instruction's last token."""
        return self._tokens(self._before).shape[1] - 1


@dataclass(frozen=True)
class _TokenModel:
    """A kind of text encoder of transformers.

    Attributes:
        encoder: of ours.
        model: of transformers.
        channels: key of the configuration with the channels of a row.
        tokens: the most of a text, where nothing says otherwise.
        instructed: whether it can read an instruction before a text.
    """

    encoder: type[TokenEncoder]
    model: PretrainedModel
    channels: str
    tokens: int = DEFAULT_TOKENS
    instructed: bool = False


_KINDS = {
    "umt5": _TokenModel(
        UMT5,
        PretrainedModel(
            "UMT5EncoderModel",
            (
                *("d_model", "d_kv", "d_ff", "num_layers", "num_heads", "feed_forward_proj"),
                *("layer_norm_epsilon", "relative_attention_num_buckets", "relative_attention_max_distance"),
            ),
            ("encoder.embed_tokens.weight",),  # shared.weight
        ),
        "d_model",
    ),
    "gemma2": _TokenModel(
        Gemma2,
        PretrainedModel(
            "Gemma2Model",
            (
                *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
                *("num_key_value_heads", "head_dim", "hidden_activation", "rms_norm_eps", "rope_parameters"),
                *("query_pre_attn_scalar", "attn_logit_softcapping", "sliding_window", "layer_types"),
            ),
        ),
        "hidden_size",
        tokens=300,  # of SANA
        instructed=True,
    ),
}
"""`model_type` of a configuration -> kind."""


def load_text_encoder(
    encoding: TextEncoding | str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    instruction: str | None = None,
) -> TextEncoder:
    """Open a text encoder.

    Args:
        encoding: description in a recipe or an index, or the name alone. A name is `words:N` (N channels), a
            folder, or a name on the Hugging Face hub. A folder holds a UMT5EncoderModel or a Gemma2Model and
            its tokenizer, or both in text_encoder/ and tokenizer/. A name alone allows texts of up to 512
            tokens, of Gemma-2 300.
        device: of the weights.
        dtype: of the weights; None is bfloat16 on GPU, float32 elsewhere.
        instruction: see TextEncoding; for a name alone.

    Raises:
        UserError: transformers is missing. The name does not exist. The model is neither umT5 nor Gemma-2.
            The weights are no safetensors or do not fit the configuration. Channels or sha256 differ from
            `encoding`. The instruction is unknown, or the encoder reads none.
    """
    if isinstance(encoding, str):
        name, tokens = encoding, None
    else:
        name, tokens, instruction = encoding.name, encoding.tokens, encoding.instruction
    if instruction is not None:
        instruction_text(instruction)  # refuses an unknown one before weights are read
    if name.startswith("words:"):
        _demand_instructed(name, instruction, False)
        words = TextEncoding(name, tokens or DEFAULT_TOKENS, _word_channels(name), text_sha256(name))
        found: TextEncoder = Words(words)
    else:
        found = _load_pretrained(name, tokens, instruction, device, dtype or default_dtype(device))
    if not isinstance(encoding, str):
        _demand_same(encoding, found.encoding)
    return found


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower()) or [_EMPTY]


def pad_rows(features: Sequence[Tensor], tokens: int) -> Tensor:
    """Pad features (rows, channels) of n texts with zeros to float32 (n, tokens, channels)."""
    padded = torch.zeros(len(features), tokens, features[0].shape[1] if features else 0)
    for row, feature in zip(padded, features, strict=True):
        row[: len(feature)] = feature
    return padded


def clean(text: str) -> str:
    """Resolve HTML entities and reduce white space to single blanks, as Wan does.

    Wan also repairs broken Unicode by ftfy.
    """
    return " ".join(html.unescape(html.unescape(text)).split())


def text_sha256(name: str) -> str:
    """Return the identity of `words:N`: its name and the version of its rule, 1."""
    return hashlib.sha256(f"{name} 1".encode()).hexdigest()


def _word_channels(name: str) -> int:
    found = _WORDS.fullmatch(name)
    if found is None or int(found[1]) < 1:
        raise UserError(
            "text_encoder", f"{name} is unknown; words:N has N channels, from 1 to 99999, e.g. words:64"
        )
    return int(found[1])


@lru_cache(maxsize=65_536)
def _word_vector(word: str, channels: int) -> np.ndarray:
    """Return the vector of a word, float32 (channels,), by the method of Box and Muller.

    numpy keeps its raw bits stable between versions, but not its normal distribution.
    """
    raw = philox("word", hashlib.sha256(word.encode()).hexdigest()).random_raw(2 * channels)
    uniform = ((raw >> np.uint64(11)).astype(np.float64) + 0.5) / 2**53  # inside (0, 1)
    radius, angle = np.sqrt(-2 * np.log(uniform[:channels])), 2 * np.pi * uniform[channels:]
    return (radius * np.cos(angle)).astype(np.float32)


def _demand_same(wanted: TextEncoding, found: TextEncoding) -> None:
    if wanted.channels != found.channels:
        raise UserError(
            "text_encoder.channels",
            f"{wanted.channels} is wrong; {wanted.name} has {found.channels} channels",
        )
    if wanted.sha256 not in (None, found.sha256):
        shown = str(found.sha256)[:12]
        raise UserError(
            "text_encoder.sha256", f"{wanted.sha256} is not the sha256 of {wanted.name}, which is {shown}..."
        )


def _demand_instructed(name: str, instruction: str | None, instructed: bool) -> None:
    if instruction is not None and not instructed:
        kinds = ", ".join(kind for kind, found in _KINDS.items() if found.instructed)
        raise UserError(
            "text_encoder.instruction",
            f"{name} reads no instruction before a text; leave it out, or take a model of type {kinds}",
        )


def _load_pretrained(
    name: str,
    tokens: int | None,
    instruction: str | None,
    device: torch.device | str,
    dtype: torch.dtype,
) -> TokenEncoder:
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise UserError(
            None, missing_extra("transformers", "diffusion", f"the text encoder {name}")
        ) from error
    local = Path(name).expanduser().is_dir()
    if not local and (Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1):
        raise UserError(
            "text_encoder",
            f"the folder {name} does not exist; give words:N, a folder written by save_pretrained, or a name "
            "like google/umt5-xxl",
        )
    address = str(Path(name).expanduser()) if local else name
    config, place = open_config(name, address, tuple(_KINDS))
    kind = _KINDS[config["model_type"]]
    _demand_instructed(name, instruction, kind.instructed)
    model = open_weights(name, address, place, kind.model)
    tokenizer = open_tokenizer(name, address, place)
    sha256 = content_hash(model, tokenizer, kind.model)
    if instruction is not None:
        sha256 = hashlib.sha256(f"{sha256} {instruction_text(instruction)}".encode()).hexdigest()
    encoding = TextEncoding(
        name, tokens or kind.tokens, int(config[kind.channels]), sha256, instruction=instruction
    )
    return kind.encoder(encoding, nn.Module.to(model, device=device, dtype=dtype), tokenizer)
