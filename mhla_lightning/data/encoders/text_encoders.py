"""Text to features for cross-attention: `words:N`, which needs no download, and umT5 of transformers (SPEC
6.2, 6.6).
"""

from __future__ import annotations

import hashlib
import html
import json
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mhla_lightning.data.encoders.vaes import default_dtype
from mhla_lightning.data.index import TextEncoding
from mhla_lightning.errors import UserError, missing_extra
from mhla_lightning.randomness import philox

__all__ = ["TextEncoder", "TextEncoding", "clean", "load_text_encoder", "pad_rows", "text_sha256"]

DEFAULT_TOKENS = 512  # of Wan2.1
_WORDS = re.compile(r"words:(\d{1,5})")
_EMPTY = " "  # no word is this: the row of a text without words
_SHOWN = 80  # characters of a text in a message


class TextEncoder(ABC):
    """What turns texts into features. Every text is encoded by itself, so its features do not depend on what
    else is encoded.

    Attributes:
        encoding: its description, with its sha256.
    """

    encoding: TextEncoding

    def encode(self, texts: Sequence[str]) -> list[Tensor]:
        """Features of each text, float32 (rows, channels) on the CPU, 1 <= rows <= tokens. Raises
        UserError for a text that has more rows.
        """
        return [self.rows(clean(text)) for text in texts]

    @abstractmethod
    def rows(self, text: str) -> Tensor:
        """Features of a text that was cleaned, float32 (rows, channels)."""

    def _demand_short(self, text: str, rows: int) -> None:
        if rows > self.encoding.tokens:
            shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
            limit = f"{self.encoding.name} takes at most {self.encoding.tokens}"
            raise UserError(
                f"the text {shown!r} has {rows} tokens, and {limit}: shorten it, or raise the text "
                "encoder's tokens"
            )


class Words(TextEncoder):
    """Each lower-cased word is a fixed vector of independent unit Gaussians; a text without words is one
    row of its own. Needs no weights.
    """

    def __init__(self, encoding: TextEncoding) -> None:
        self.encoding = encoding

    def rows(self, text: str) -> Tensor:
        """A row a word."""
        words = re.findall(r"\w+", text.lower()) or [_EMPTY]
        self._demand_short(text, len(words))
        return torch.from_numpy(np.stack([_word_vector(word, self.encoding.channels) for word in words]))


class UMT5(TextEncoder):
    """The encoder of umT5, with its own tokenizer. A row a token, the end of the text among them."""

    def __init__(self, encoding: TextEncoding, model: nn.Module, tokenizer: Any) -> None:
        self.encoding, self.model, self.tokenizer = encoding, model, tokenizer

    @torch.no_grad()
    def rows(self, text: str) -> Tensor:
        """The last hidden state of all tokens."""
        tokens = self.tokenizer(text, add_special_tokens=True, return_tensors="pt").input_ids
        self._demand_short(text, tokens.shape[1])  # attention over a whole book would take all memory
        device = next(self.model.parameters()).device
        return self.model(input_ids=tokens.to(device)).last_hidden_state[0].float().cpu()


def load_text_encoder(
    encoding: TextEncoding | str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> TextEncoder:
    """Open a text encoder.

    Args:
        encoding: what a recipe or an index says of it, or its name alone: `words:N` (N channels); a folder
            with a UMT5EncoderModel and its tokenizer, both there or in text_encoder/ and tokenizer/; or a
            name of such on the Hugging Face hub. A name alone takes texts up to 512 tokens.
        device, dtype: of the weights. dtype None: bfloat16 on GPU, float32 elsewhere.

    Raises:
        UserError: transformers is missing; nothing of this name; another model than umT5; weights that are
            not safetensors or not those of the configuration; channels or a sha256 other than `encoding`
            says.
    """
    name = encoding if isinstance(encoding, str) else encoding.name
    tokens = DEFAULT_TOKENS if isinstance(encoding, str) else encoding.tokens
    if name.startswith("words:"):
        found: TextEncoder = Words(TextEncoding(name, tokens, _word_channels(name), text_sha256(name)))
    else:
        found = _load_umt5(name, tokens, device, dtype or default_dtype(device))
    if not isinstance(encoding, str):
        _demand_same(encoding, found.encoding)
    return found


def pad_rows(features: Sequence[Tensor], tokens: int) -> Tensor:
    """Features (rows, channels) of n texts, zero-padded to float32 (n, tokens, channels)."""
    padded = torch.zeros(len(features), tokens, features[0].shape[1] if features else 0)
    for row, feature in zip(padded, features, strict=True):
        row[: len(feature)] = feature
    return padded


def clean(text: str) -> str:
    """HTML entities resolved, and every stretch of white space one blank, as in Wan (which also lets ftfy
    mend broken Unicode).
    """
    return " ".join(html.unescape(html.unescape(text)).split())


def text_sha256(name: str) -> str:
    """The identity of `words:N`: of its rule, the first of its kind."""
    return hashlib.sha256(f"{name} 1".encode()).hexdigest()


def _word_channels(name: str) -> int:
    found = _WORDS.fullmatch(name)
    if found is None or int(found[1]) < 1:
        raise UserError(
            f"the text encoder {name} is unknown: words:N has N channels, from 1 to 99999, e.g. words:64"
        )
    return int(found[1])


@lru_cache(maxsize=65_536)
def _word_vector(word: str, channels: int) -> np.ndarray:
    """float32 (channels,), by Box and Muller from raw bits: numpy promises those, and not its normal
    distribution, for ever.
    """
    raw = philox("word", hashlib.sha256(word.encode()).hexdigest()).random_raw(2 * channels)
    uniform = ((raw >> np.uint64(11)).astype(np.float64) + 0.5) / 2**53  # inside (0, 1)
    radius, angle = np.sqrt(-2 * np.log(uniform[:channels])), 2 * np.pi * uniform[channels:]
    return (radius * np.cos(angle)).astype(np.float32)


def _demand_same(wanted: TextEncoding, found: TextEncoding) -> None:
    if wanted.channels != found.channels:
        raise UserError(
            f"the text encoder {wanted.name} gives {found.channels} channels, and "
            f"text_encoder.channels is {wanted.channels}"
        )
    if wanted.sha256 not in (None, found.sha256):
        shown = str(found.sha256)[:12]
        raise UserError(
            f"the text encoder {wanted.name} has sha256 {shown}..., and text_encoder.sha256 is "
            f"{wanted.sha256}: it is another"
        )


def _load_umt5(name: str, tokens: int, device: torch.device | str, dtype: torch.dtype) -> UMT5:
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise UserError(missing_extra("transformers", "diffusion", f"the text encoder {name}")) from error
    local = Path(name).expanduser().is_dir()
    if not local and (Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1):
        raise UserError(
            f"there is no folder {name}: a text encoder is words:N, a folder written by "
            "save_pretrained, or a name like google/umt5-xxl"
        )
    address = str(Path(name).expanduser()) if local else name
    config, place = _config(name, address)
    model = _model(name, address, place)
    tokenizer = _tokenizer(name, address, place)
    sha256 = _sha256(model, tokenizer)
    moved = nn.Module.to(model, device=device, dtype=dtype)
    return UMT5(TextEncoding(name, tokens, int(config["d_model"]), sha256), moved, tokenizer)


def _config(name: str, address: str) -> tuple[dict[str, Any], str]:
    """The configuration and where the model lies: at the top or, in a pipeline, in text_encoder."""
    from transformers import UMT5Config

    reasons = []
    for place in ("", "text_encoder"):
        try:
            with _quiet():
                config, _ = UMT5Config.get_config_dict(address, subfolder=place)
        except (OSError, ValueError, RuntimeError) as error:  # of transformers and of the hub
            reasons.append(" ".join(str(error).split())[:200])
            if "connect" in str(error).lower() or "offline" in str(error).lower():
                break
            continue
        if config.get("model_type") == "umt5":
            return config, place
        if config.get("model_type"):
            raise UserError(
                f"the text encoder {name} is a model of type {config['model_type']}; umt5 is what there is"
            )
        reasons.append("its config.json is of no text encoder")
    raise UserError(
        f"the text encoder {name} is no folder of a UMT5EncoderModel here, and could not be fetched "
        f"from the hub ({reasons[0]})"
    )


def _model(name: str, address: str, place: str) -> nn.Module:
    from transformers import UMT5EncoderModel

    try:
        with _quiet(), torch.random.fork_rng(devices=[]):
            opened: Any = UMT5EncoderModel.from_pretrained(
                address,
                subfolder=place,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                dtype="auto",
            )
            model, info = opened
    except Exception as error:  # noqa: BLE001
        # of transformers, safetensors, the hub, and torch for sizes that do not fit
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"the weights of the text encoder {name} cannot be read from a safetensors file ({reason})"
        ) from error
    wrong = sorted(str(key) for kind in ("missing_keys", "mismatched_keys") for key in info[kind])
    if wrong:
        raise UserError(
            f"the weights of the text encoder {name} are not those of its config.json: {len(wrong)} "
            f"are missing, e.g. {wrong[0]}"
        )
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
        raise UserError(f"the text encoder {name} has no tokenizer that can be read ({reason})") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers draws a progress bar and warns of models that miss what is not used."""
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


def _sha256(model: nn.Module, tokenizer: Any) -> str:
    """Of what decides the features: sizes, vocabulary, and the weights as float32. The same for every
    copy, device and dtype.
    """
    config: Any = model.config
    sizes = [
        getattr(config, key)
        for key in (
            "d_model",
            "d_kv",
            "d_ff",
            "num_layers",
            "num_heads",
            "feed_forward_proj",
            "layer_norm_epsilon",
        )
    ]
    sizes += [config.relative_attention_num_buckets, config.relative_attention_max_distance]
    digest = hashlib.sha256(json.dumps([sizes, sorted(tokenizer.get_vocab().items())]).encode())
    for key, tensor in sorted(model.state_dict().items()):
        if key != "encoder.embed_tokens.weight":  # the same as shared.weight
            digest.update(f"{key} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().float().contiguous().numpy())
    return digest.hexdigest()
