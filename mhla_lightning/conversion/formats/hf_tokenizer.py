"""A tokenizer of ours as the files that transformers' AutoTokenizer opens."""

from __future__ import annotations

import json
from typing import Any

from mhla_lightning.data.tokenizers.base import END_OF_DOCUMENT, ByteTokenizer, Tokenizer
from mhla_lightning.data.tokenizers.fast import CONFIG_NAME, FILE_NAME

_BYTES_END = "<|endoftext|>"


def tokenizer_files(tokenizer: Tokenizer | None, context: int) -> dict[str, bytes]:
    """Return tokenizer.json and tokenizer_config.json, which encode as our own tokenizer does.

    Nothing is put before or after a text, and a special token in it is text. Batches are padded on the left
    with the token that ends documents.

    Args:
        tokenizer: None returns no files.
        context: tokens of a training row.
    """
    if tokenizer is None:
        return {}
    if isinstance(tokenizer, ByteTokenizer):
        described, end = _of_bytes(), _BYTES_END
    else:
        described = json.loads(tokenizer.files[FILE_NAME])
        end = json.loads(tokenizer.files.get(CONFIG_NAME, b"{}")).get("eos_token")
        if (described.get("post_processor") or {}).get("type") != "ByteLevel":
            described["post_processor"] = None
        described |= {"truncation": None, "padding": None}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "padding_side": "left",
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
    }
    ends = {} if end is None else {"eos_token": end, "pad_token": end}
    files = {FILE_NAME: described, CONFIG_NAME: settings | ends}
    return {name: f"{json.dumps(content, ensure_ascii=False)}\n".encode() for name, content in files.items()}


def _of_bytes() -> dict[str, Any]:
    """Return a tokenizer.json whose ids are the bytes of a text."""
    end = {
        "id": END_OF_DOCUMENT,
        "content": _BYTES_END,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    as_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end],
        "normalizer": None,
        "pre_tokenizer": as_bytes,
        "post_processor": None,
        "decoder": as_bytes,
        "model": {"type": "BPE", "vocab": {letter: i for i, letter in enumerate(_letters())}, "merges": []},
    }


def _letters() -> list[str]:
    """Return the letter that byte-level tokenizers write for each byte.

    It is the byte's own letter where that is printable.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
