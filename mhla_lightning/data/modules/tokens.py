"""The LightningDataModule of packed token sequences."""

from __future__ import annotations

from typing import Any

from mhla_lightning.data.check import Verify
from mhla_lightning.data.corpus import Source
from mhla_lightning.data.index import INDEX_NAME, SPLITS, ShardIndex
from mhla_lightning.data.kinds import Tokens
from mhla_lightning.data.loader import Loading
from mhla_lightning.data.modules.base import ShardDataModule
from mhla_lightning.data.order import LANES, WINDOW
from mhla_lightning.data.stores import Remote
from mhla_lightning.errors import DataError


class TokenDataModule(ShardDataModule):
    """Rows of tokens with document numbers, from shards.

    Args:
        path, batch_size, micro_batch_size, epochs, num_workers, mix: see :class:`ShardDataModule`.
        vocabulary: number of token ids; a row with a larger id is skipped and counted. None takes any.
        lanes, window, seed, max_skipped_share, verify, loading, remote: see :class:`ShardDataModule`.
    """

    def __init__(
        self,
        path: str | None = None,
        batch_size: int = 256,
        micro_batch_size: int | None = None,
        epochs: float | None = None,
        num_workers: int = 1,
        vocabulary: int | None = None,
        mix: list[Source] | None = None,
        lanes: int = LANES,
        window: int = WINDOW,
        seed: int | None = None,
        max_skipped_share: float = 0.01,
        verify: Verify = "auto",
        loading: Loading | None = None,
        remote: Remote | None = None,
    ) -> None:
        """Store and validate the arguments. Raises UserError."""
        super().__init__(
            path, batch_size, micro_batch_size, epochs, num_workers, mix, lanes, window, seed, max_skipped_share, verify, loading, remote
        )
        self.vocabulary = vocabulary

    def kind(self, index: ShardIndex) -> Tokens:
        """Rows of the training split's length."""
        return Tokens(self.index().length or 0, self.vocabulary)

    def check(self, world_size: int) -> None:
        """Also that all splits were made by the same tokenizer."""
        super().check(world_size)
        for name in SPLITS:
            for split in self.splits(name):
                if split.index.tokenizer != self.index().tokenizer:
                    found = f"{split.store.address(INDEX_NAME)} was made with the tokenizer {split.index.tokenizer}"
                    raise DataError(f"{found}, and {self.sources[0].path} with {self.index().tokenizer}: tokenize both with the same")

    def facts(self) -> dict[str, Any]:
        """Kind, tokens a row, tokenizer and vocabulary."""
        return {"kind": "tokens", "length": self.index().length, "tokenizer": self.index().tokenizer, "vocabulary": self.vocabulary}
