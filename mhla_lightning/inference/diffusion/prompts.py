"""Read prompts from files, and encode and keep their text features.

Each prompt knows its file and line for error messages.
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
from mhla_lightning.inference.diffusion.parts import drawn_part, read_npy, write_npy


@dataclass(frozen=True)
class Prompt:
    """A text and its origin, such as `prompts.txt, line 3`."""

    text: str
    where: str


def read_prompts(path: str | Path) -> list[Prompt]:
    """Read one prompt per line; empty lines are skipped.

    A line of a .jsonl file is an object with the text under the key `prompt`.

    Raises:
        UserError: no such file, no UTF-8, no prompt in it, or a .jsonl line without a prompt.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise UserError(str(path), f"this file cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(str(path), f"this file is not UTF-8 text (byte {error.start})") from error
    places = [
        (line.strip(), f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()
    ]
    found = [
        Prompt(_of_json(line, where) if path.suffix == ".jsonl" else line, where) for line, where in places
    ]
    if not found:
        raise UserError(str(path), "this file holds no prompt; write one per line")
    return found


def _of_json(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(
            where, f'not JSON ({error.msg}); a line is an object like {{"prompt": "a red ball falls"}}'
        ) from error
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
        identity = json.dumps([asdict(self.encoding), text], sort_keys=True)
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
