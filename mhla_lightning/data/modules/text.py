"""Prompts to features, by the same encoder as the captions of the data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from mhla_lightning.data.index import TextEncoding
from mhla_lightning.errors import UserError


def demand_words(encoding: TextEncoding, samples: str, instead: str) -> None:
    """Refuse an encoder that is too slow to run while samples are loaded: all but words:N.

    Args:
        encoding: of the recipe.
        samples: what is loaded, in the plural.
        instead: what to do for another encoder.

    Raises:
        UserError: another encoder.
    """
    if not encoding.name.startswith("words:"):
        raise UserError(
            "text_encoder.name",
            f"'{encoding.name}' is too slow to run while {samples} are loaded; use words:N, e.g. words:64, "
            f"or {instead}",
        )


class TextConditioned:
    """The methods `encode_text` and `null_text` of a LightningDataModule.

    The encoder is opened for a text that was not encoded before, and released again: umT5 takes 11 GB.

    Attributes:
        text_encoder: the encoder of the captions; None for data without text.
    """

    text_encoder: TextEncoding | None = None
    _features: dict[str, Tensor] | None = None

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Encode prompts to features, zero-padded, float32 (n, tokens, channels) on the CPU.

        Raises UserError for a text that is too long.
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
        """Return the features of the empty prompt, zero-padded, float32 (tokens, channels)."""
        return self.encode_text([""])[0]

    def _encoding(self) -> TextEncoding:
        if self.text_encoder is None:
            raise UserError(
                "text_encoder", "it is not set; prompts need the name, tokens and channels of an encoder"
            )
        return self.text_encoder

    def _known_features(self) -> dict[str, Tensor]:
        """Return the features (rows, channels) of the texts that were encoded before."""
        if self._features is None:
            self._features = {}
        return self._features

    def _text_device(self) -> torch.device:
        if isinstance(self, LightningDataModule) and self.trainer is not None:
            return self.trainer.strategy.root_device
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
