"""Text to token ids and back: bytes, tokenizer.json, Hugging Face hub. No torch."""

from __future__ import annotations

from mhla_lightning.data.tokenizers.base import TextStream, Tokenizer
from mhla_lightning.data.tokenizers.opening import (
    find_tokenizer,
    open_tokenizer,
    same_tokenizer,
    tokenizer_of,
)

__all__ = ["TextStream", "Tokenizer", "find_tokenizer", "open_tokenizer", "same_tokenizer", "tokenizer_of"]
