"""Text to features for cross-attention: `words:N`, umT5 (SPEC 6.2, 6.6) and SANA's Gemma-2."""

from __future__ import annotations

import hashlib
import html
import json
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mhla_lightning.data.encoders.vaes import default_dtype
from mhla_lightning.data.index import TextEncoding
from mhla_lightning.errors import UserError, missing_extra
from mhla_lightning.finite import check_finite
from mhla_lightning.randomness import philox

__all__ = ["TextEncoder", "TextEncoding", "clean", "load_text_encoder", "pad_rows", "text_sha256"]

DEFAULT_TOKENS = 512  # of Wan2.1
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

    def encode(self, texts: Sequence[str]) -> list[Tensor]:
        """Return the features of each text, float32 (rows, channels), 1 <= rows <= tokens.

        They are on the CPU.
        Raises UserError for a text with more rows.
        """
        return [self.rows(clean(text)) for text in texts]

    @abstractmethod
    def rows(self, text: str) -> Tensor:
        """Return the features of a cleaned text, float32 (rows, channels)."""

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

    def rows(self, text: str) -> Tensor:
        """Return one row for each word."""
        words = re.findall(r"\w+", text.lower()) or [_EMPTY]
        self._demand_short(text, len(words))
        return torch.from_numpy(np.stack([_word_vector(word, self.encoding.channels) for word in words]))


class TokenEncoder(TextEncoder):
    """A model of transformers with its tokenizer; each token, special ones included, is a row."""

    def __init__(self, encoding: TextEncoding, model: nn.Module, tokenizer: Any) -> None:
        self.encoding, self.model, self.tokenizer = encoding, model, tokenizer

    @torch.no_grad()
    def rows(self, text: str) -> Tensor:
        """Return the last hidden state of all tokens."""
        tokens = self.tokenizer(text, add_special_tokens=True, return_tensors="pt").input_ids
        self._demand_short(text, tokens.shape[1])  # attention over a whole book would take all memory
        device = next(self.model.parameters()).device
        return self.model(input_ids=tokens.to(device)).last_hidden_state[0].float().cpu()


class UMT5(TokenEncoder):
    """The encoder of umT5, as Wan2.1 has it."""


class Gemma2(TokenEncoder):
    """The decoder Gemma-2 as SANA has it: the last hidden state of the lower-cased text.

    SANA's pipeline can put an instruction before the text, which changes the features; here there is none.
    """

    def rows(self, text: str) -> Tensor:
        return super().rows(text.lower())


@dataclass(frozen=True)
class _Pretrained:
    """A kind of text encoder of transformers.

    Attributes:
        encoder: of ours.
        model: name of the class in transformers.
        channels: key of the configuration with the channels of a row.
        sizes: keys of the configuration that decide the features.
        doubled: tensors that are the same as others.
    """

    encoder: type[TokenEncoder]
    model: str
    channels: str
    sizes: tuple[str, ...]
    doubled: tuple[str, ...] = ()


_KINDS = {
    "umt5": _Pretrained(
        UMT5,
        "UMT5EncoderModel",
        "d_model",
        (
            *("d_model", "d_kv", "d_ff", "num_layers", "num_heads", "feed_forward_proj"),
            *("layer_norm_epsilon", "relative_attention_num_buckets", "relative_attention_max_distance"),
        ),
        ("encoder.embed_tokens.weight",),  # shared.weight
    ),
    "gemma2": _Pretrained(
        Gemma2,
        "Gemma2Model",
        "hidden_size",
        (
            *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
            *("num_key_value_heads", "head_dim", "hidden_activation", "rms_norm_eps", "rope_parameters"),
            *("query_pre_attn_scalar", "attn_logit_softcapping", "sliding_window", "layer_types"),
        ),
    ),
}
"""`model_type` of a configuration -> kind."""


def load_text_encoder(
    encoding: TextEncoding | str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> TextEncoder:
    """Open a text encoder.

    Args:
        encoding: description in a recipe or an index, or the name alone. A name is `words:N` (N channels), a
            folder, or a name on the Hugging Face hub. A folder holds a UMT5EncoderModel or a Gemma2Model and
            its tokenizer, or both in text_encoder/ and tokenizer/. A name alone allows texts of up to 512
            tokens.
        device: of the weights.
        dtype: of the weights; None is bfloat16 on GPU, float32 elsewhere.

    Raises:
        UserError: transformers is missing. The name does not exist. The model is neither umT5 nor Gemma-2.
            The weights are no safetensors or do not fit the configuration. Channels or sha256 differ from
            `encoding`.
    """
    name = encoding if isinstance(encoding, str) else encoding.name
    tokens = DEFAULT_TOKENS if isinstance(encoding, str) else encoding.tokens
    if name.startswith("words:"):
        found: TextEncoder = Words(TextEncoding(name, tokens, _word_channels(name), text_sha256(name)))
    else:
        found = _load_pretrained(name, tokens, device, dtype or default_dtype(device))
    if not isinstance(encoding, str):
        _demand_same(encoding, found.encoding)
    return found


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


def _load_pretrained(name: str, tokens: int, device: torch.device | str, dtype: torch.dtype) -> TokenEncoder:
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
    config, place = _config(name, address)
    kind = _KINDS[config["model_type"]]
    model = _model(name, address, place, kind)
    tokenizer = _tokenizer(name, address, place)
    sha256 = _sha256(model, tokenizer, kind)
    moved = nn.Module.to(model, device=device, dtype=dtype)
    return kind.encoder(TextEncoding(name, tokens, int(config[kind.channels]), sha256), moved, tokenizer)


def _config(name: str, address: str) -> tuple[dict[str, Any], str]:
    """Return the configuration and the subfolder of the model.

    The subfolder is empty or, in a pipeline, text_encoder.
    """
    from transformers import PretrainedConfig

    reasons = []
    for place in ("", "text_encoder"):
        try:
            with _quiet():
                config, _ = PretrainedConfig.get_config_dict(address, subfolder=place)
        except (OSError, ValueError, RuntimeError) as error:  # of transformers and of the hub
            reasons.append(" ".join(str(error).split())[:200])
            if "connect" in str(error).lower() or "offline" in str(error).lower():
                break
            continue
        if config.get("model_type") in _KINDS:
            return config, place
        if config.get("model_type"):
            raise UserError(
                "text_encoder",
                f"{name} is a model of type {config['model_type']}; supported are {' and '.join(_KINDS)}",
            )
        reasons.append("its config.json is of no text encoder")
    raise UserError(
        "text_encoder",
        f"{name} is no folder of a UMT5EncoderModel or Gemma2Model here, and could not be fetched from the "
        f"hub ({reasons[0]})",
    )


def _model(name: str, address: str, place: str, kind: _Pretrained) -> nn.Module:
    import transformers

    try:
        with _quiet(), torch.random.fork_rng(devices=[]):
            opened: Any = getattr(transformers, kind.model).from_pretrained(
                address,
                subfolder=place,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                dtype="auto",
            )
            model, info = opened
    except Exception as error:  # noqa: BLE001  of four packages: transformers, safetensors, the hub, torch
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            "text_encoder", f"the weights of {name} cannot be read from a safetensors file ({reason})"
        ) from error
    wrong = sorted(str(key) for kind in ("missing_keys", "mismatched_keys") for key in info[kind])
    if wrong:
        raise UserError(
            "text_encoder",
            f"the weights of {name} do not fit its config.json: {len(wrong)} are missing, e.g. {wrong[0]}",
        )
    check_finite(model.state_dict(), "text_encoder", f"{name}: ")
    return model.eval().requires_grad_(False)


def _tokenizer(name: str, address: str, place: str) -> Any:
    from transformers import AutoTokenizer

    try:
        with _quiet():
            return AutoTokenizer.from_pretrained(
                address, subfolder="tokenizer" if place else "", trust_remote_code=False
            )
    except Exception as error:  # noqa: BLE001  of transformers, tokenizers and the hub
        reason = " ".join(str(error).split())[:200]
        raise UserError("text_encoder", f"{name} has no tokenizer that can be read ({reason})") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the progress bar of transformers and its warnings about unused weights."""
    from transformers.utils import logging

    bar, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def _sha256(model: nn.Module, tokenizer: Any, kind: _Pretrained) -> str:
    """Return the sha256 of everything that decides the features.

    These are sizes, vocabulary and weights (as float32).
    It is the same for every copy, device and dtype.
    """
    config: Any = model.config
    sizes = [getattr(config, key) for key in kind.sizes]
    digest = hashlib.sha256(json.dumps([sizes, sorted(tokenizer.get_vocab().items())]).encode())
    for key, tensor in sorted(model.state_dict().items()):
        if key not in kind.doubled:
            digest.update(f"{key} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().float().contiguous().numpy())
    return digest.hexdigest()
