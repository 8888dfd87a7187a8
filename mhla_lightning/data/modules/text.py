"""What the data modules whose samples come with text share: prompts to features, encoded as the data's own
captions were.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mhla_lightning.data.index import TextEncoding
from mhla_lightning.errors import UserError


class TextConditioned:
    """Adds `encode_text` and `null_text` to a LightningDataModule.

    The encoder is opened when a text is asked for that was not encoded before, and let go again: umT5 takes
    11 GB.

    Attributes:
        text_encoder: what encodes; None for data without text.
    """

    text_encoder: TextEncoding | None = None
    _features: dict[str, Tensor] | None = None

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Features of prompts, zero-padded, float32 (n, tokens, channels) on the CPU. Raises UserError for
        a text that is too long.
        """
        from mhla_lightning.data.encoders.text_encoders import load_text_encoder, pad_rows

        encoding = self._encoding()
        known = self._known_features()
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
        if new:
            encoder = load_text_encoder(encoding, self._text_device())
            known.update(zip(new, encoder.encode(new), strict=True))
        if not prompts:
            return torch.zeros(0, encoding.tokens, encoding.channels)
        return pad_rows([known[prompt] for prompt in prompts], encoding.tokens)

    def null_text(self) -> Tensor:
        """Features of the empty prompt, zero-padded, float32 (tokens, channels)."""
        return self.encode_text([""])[0]

    def _encoding(self) -> TextEncoding:
        if self.text_encoder is None:
            raise UserError("data.text_encoder is not set: name, tokens and channels of what encodes prompts")
        return self.text_encoder

    def _known_features(self) -> dict[str, Tensor]:
        """Features by text, (rows, channels), of what was encoded before."""
        if self._features is None:
            self._features = {}
        return self._features

    def _text_device(self) -> torch.device:
        trainer: Any = getattr(self, "trainer", None)
        if trainer is not None:
            return torch.device(trainer.strategy.root_device)
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
