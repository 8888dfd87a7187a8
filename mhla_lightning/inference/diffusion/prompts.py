"""Read prompts from files, and encode and keep their text features.

Each prompt knows its file and line for error messages.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mhla_lightning.data.index import TextEncoding
from mhla_lightning.errors import UserError
from mhla_lightning.inference.diffusion.parts import drawn_part, read_npy, write_npy
from mhla_lightning.textfiles import NotText, is_json, json_rows, read_text, split_lines


@dataclass(frozen=True)
class Prompt:
    """A text and its origin, such as `prompts.txt, line 3`."""

    text: str
    where: str


def read_prompts(path: str | Path) -> list[Prompt]:
    """Read one prompt per line; empty lines are skipped.

    A file named .jsonl, .ndjson, .jl or .json holds objects with the text under the key `prompt`.

    Raises:
        UserError: no such file, no text, no prompt in it, or an object without a prompt.
    """
    path = Path(path)
    text = read_text(path)
    if is_json(path):
        found = _of_json(path, text)
    else:
        lines = ((line.strip(), number) for number, line in enumerate(split_lines(text), 1))
        found = [Prompt(line, f"{path}, line {number}") for line, number in lines if line]
    if not found:
        raise UserError(str(path), "this file holds no prompt; write one per line")
    return found


def _of_json(path: Path, text: str) -> list[Prompt]:
    try:
        rows = [(f"{path}, {place}", row) for place, row in json_rows(text)]
    except NotText as error:
        place, _, reason = str(error).partition(" is no JSON ")
        raise UserError(
            f"{path}, {place}", f'no JSON {reason}; a line is an object like {{"prompt": "a red ball falls"}}'
        ) from error
    return [Prompt(_text_of(row, where), where) for where, row in rows]


def _text_of(value: Any, where: str) -> str:
    text = value.get("prompt") if isinstance(value, dict) else None
    if not isinstance(text, str):
        raise UserError(where, 'no text under the key "prompt"')
    return text


class TextCache:
    """Text features in a folder, one file per prompt, so that a second run needs no encoder.

    The name of a file depends on the encoder and the text.

    Args:
        folder: made where it does not exist.
        encoding: the text encoder that the run's data name.
    """

    def __init__(self, folder: Path, encoding: TextEncoding) -> None:
        self.folder, self.encoding = folder, encoding

    def file(self, text: str) -> Path:
        """Return the file with the features of a text."""
        identity = json.dumps([self.encoding.facts(), text], sort_keys=True)
        return self.folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:24]}.npy"

    def encode(
        self, prompts: Sequence[Prompt], device: torch.device, on_prompt: Callable[[], Any] = lambda: None
    ) -> dict[str, np.ndarray]:
        """Encode the prompts that are not kept yet, for :meth:`keep`.

        Args:
            prompts: texts and their origins.
            device: where the encoder runs.
            on_prompt: called after each prompt.

        Returns:
            features (rows, channels) by text.

        Raises:
            UserError: the encoder cannot be opened, or a prompt is too long; the key is the prompt's origin.
        """
        # Reversed, so that an error names the first origin of a text that is given twice.
        missing = {
            prompt.text: prompt for prompt in reversed(prompts) if read_npy(self.file(prompt.text)) is None
        }
        if not missing:
            return {}
        from mhla_lightning.data.encoders.text_encoders import load_text_encoder

        encoder = load_text_encoder(self.encoding, device)
        features = {}
        for text, prompt in reversed(missing.items()):
            try:
                features[text] = encoder.encode([text])[0].numpy()
            except UserError as error:
                raise UserError(prompt.where, error.reason) from error
            on_prompt()
        return features

    def keep(self, features: Mapping[str, np.ndarray]) -> None:
        """Write features by text."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for text, rows in features.items():
            write_npy(self.file(text), rows)

    def read(self, texts: Sequence[str]) -> Tensor:
        """Read kept features, zero-padded: float32 (texts, tokens, channels)."""
        padded = torch.zeros(len(texts), self.encoding.tokens, self.encoding.channels)
        for row, text in zip(padded, texts, strict=True):
            kept = drawn_part(self.file(text))
            row[: len(kept)] = torch.from_numpy(kept)
        return padded
