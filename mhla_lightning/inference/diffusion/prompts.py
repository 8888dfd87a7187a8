"""Prompts out of files, and their text features, encoded once and kept. Each prompt knows where it stands,
so that a mistake can be found.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mhla_lightning.data.index import TextEncoding
from mhla_lightning.errors import UserError
from mhla_lightning.inference.diffusion.parts import write_npy


@dataclass(frozen=True)
class Prompt:
    """A text and where it was given: `prompts.txt, line 3`."""

    text: str
    where: str


def read_prompts(path: str | Path) -> list[Prompt]:
    """A prompt a line; of a file named .jsonl the text under the key `prompt` of every line's object. Empty
    lines are skipped.

    Raises:
        UserError: no such file, not UTF-8, no prompt in it, a line of a .jsonl that has none.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start})") from error
    places = [
        (line.strip(), f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()
    ]
    found = [
        Prompt(_of_json(line, where) if path.suffix == ".jsonl" else line, where) for line, where in places
    ]
    if not found:
        raise UserError(f"{path} holds no prompt; write one a line")
    return found


def _of_json(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(
            f'{where} is no JSON ({error.msg}); a line is an object like {{"prompt": "a red ball falls"}}'
        ) from error
    text = value.get("prompt") if isinstance(value, dict) else None
    if not isinstance(text, str):
        raise UserError(f'{where} has no text under the key "prompt"')
    return text


class TextCache:
    """Text features in a folder, a file a prompt, under the identity of what encodes them: a second run needs
    no encoder.

    Args:
        folder: made where it does not exist.
        encoding: what encodes, as the run's data say it.
    """

    def __init__(self, folder: Path, encoding: TextEncoding) -> None:
        self.folder, self.encoding = folder, encoding

    def file(self, text: str) -> Path:
        """Where the features of a text are kept."""
        identity = json.dumps([asdict(self.encoding), text], sort_keys=True)
        return self.folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:24]}.npy"

    def encode(
        self, prompts: Sequence[Prompt], device: torch.device, on_prompt: Callable[[], Any] = lambda: None
    ) -> dict[str, np.ndarray]:
        """Features (rows, channels) of the prompts that are not kept yet, for :meth:`keep`.

        Raises:
            UserError: the encoder cannot be opened; a prompt is too long, with its place.
        """
        missing = {
            prompt.text: prompt for prompt in reversed(prompts) if not self.file(prompt.text).is_file()
        }  # its first place is named
        if not missing:
            return {}
        from mhla_lightning.data.encoders.text_encoders import load_text_encoder

        encoder = load_text_encoder(self.encoding, device)
        features = {}
        for text, prompt in reversed(missing.items()):
            try:
                features[text] = encoder.encode([text])[0].numpy()
            except UserError as error:
                raise UserError(f"{prompt.where}: {error}") from error
            on_prompt()
        return features

    def keep(self, features: Mapping[str, np.ndarray]) -> None:
        """Writes features by text."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for text, rows in features.items():
            write_npy(self.file(text), rows)

    def read(self, texts: Sequence[str]) -> Tensor:
        """Features of texts that were encoded, zero-padded: float32 (texts, tokens, channels)."""
        padded = torch.zeros(len(texts), self.encoding.tokens, self.encoding.channels)
        for row, text in zip(padded, texts, strict=True):
            kept = np.load(self.file(text), allow_pickle=False)
            row[: len(kept)] = torch.from_numpy(kept)
        return padded
