"""The LightningDataModule of packed token sequences."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from mhla_lightning.data.corpus import DataSource
from mhla_lightning.data.index import INDEX_NAME, SPLITS, ShardIndex
from mhla_lightning.data.kinds import Tokens
from mhla_lightning.data.modules.base import ShardDataModule
from mhla_lightning.data.modules.options import ORDER, TEXT, OrderConfig, ReadingConfig, TextConfig
from mhla_lightning.data.prepare.sources import mqar
from mhla_lightning.data.prepare.text.tokenize import LENGTH, VAL, TextOptions
from mhla_lightning.data.tokenizers import Tokenizer, find_tokenizer, open_tokenizer, same_tokenizer
from mhla_lightning.errors import DataError, UserError, inside

_READING = ReadingConfig(num_workers=1)


class TokenDataModule(ShardDataModule):
    """Rows of tokens with document numbers, from shards.

    Args:
        path, mix, batch_size, micro_batch_size, epochs, order, reading: see :class:`ShardDataModule`.
        vocabulary: number of token ids; a row with a larger id is skipped and counted. None takes the
            tokenizer's, or any id where there is no tokenizer.
        source: text that prepare_data packs into `path` when `path` holds no shards yet: stdlib, files, a
            folder (see mhla data tokenize), mqar[:PAIRS].
        text: tokenizer, lengths and packing of `source`.
    """

    def __init__(
        self,
        path: str | None = None,
        batch_size: int = 256,
        micro_batch_size: int | None = None,
        epochs: float | None = None,
        vocabulary: int | None = None,
        source: str | None = None,
        text: TextConfig = TEXT,
        mix: list[DataSource] | None = None,
        order: OrderConfig = ORDER,
        reading: ReadingConfig = _READING,
    ) -> None:
        """Store and validate the arguments. Raises UserError."""
        super().__init__(path, mix, batch_size, micro_batch_size, epochs, order, reading)
        self._take_source(source, path)
        self.vocabulary, self.text = vocabulary, text
        if source is not None and mqar.is_mqar(source):
            self._recall(source)
        elif source is not None:
            with inside("text"):
                self._options = TextOptions(
                    text.tokenizer or "bytes",
                    text.length or LENGTH,
                    text.val_length,
                    text.packing,
                    VAL if text.val is None else text.val,
                )

    def _recall(self, source: str) -> Any:
        text = self.text
        held_out: Any = {} if text.val is None else {"val": text.val}  # open_mqar refuses a share
        try:
            return mqar.open_mqar(source, text.length or mqar.LENGTH, text.val_length, **held_out)
        except UserError as error:
            key = error.key if error.key in (None, "source") else f"text.{error.key}"
            raise UserError(key, error.reason) from error

    def _pack(self, source: str, folder: Path) -> None:
        from mhla_lightning.data.prepare.pack import pack
        from mhla_lightning.data.prepare.parallel import default_workers
        from mhla_lightning.data.prepare.text.tokenize import tokenize

        if mqar.is_mqar(source):
            pack(self._recall(source), folder)
        else:
            tokenize([source], folder, self._options, workers=default_workers())
        self.__dict__.pop("_opened", None)

    def kind(self, index: ShardIndex) -> Tokens:
        """Return rows of this split's length."""
        return Tokens(index.length or 0, self._vocabulary)

    def check(self, world_size: int) -> None:
        """Check also the tokenizer of all splits, their length of rows, and the options of `source`."""
        super().check(world_size)
        for name in SPLITS:
            for split in self.splits(name):
                address = split.store.address(INDEX_NAME)
                if not same_tokenizer(split.index.tokenizer, self.index().tokenizer):
                    raise DataError(
                        address,
                        f"its tokenizer is {split.index.tokenizer}, and that of {self.sources[0].path} is "
                        f"{self.index().tokenizer}: tokenize both with the same",
                    )
                Tokens(self.index(name).length or 0).check(split.index, address)
        recall = self.source is not None and mqar.is_mqar(self.source)
        if not recall and (self.text.tokenizer or self.source) is not None:
            self._check_tokenizer(self.text.tokenizer or "bytes")
        if self.source is not None:
            self._check_made(recall)

    def _check_tokenizer(self, named: str) -> None:
        """Refuse shards of another tokenizer than the recipe's."""
        found, file = self.index().tokenizer or "none", Path(named).expanduser()
        if named == "bytes" or file.exists():
            with inside("text"):
                same = same_tokenizer(found, open_tokenizer(named).name)
        else:  # a name, whose content is not fetched again
            same = file.suffix == ".json" or found.partition(" sha256:")[0] == named
        if not same:
            raise UserError(
                "text.tokenizer",
                f"{named} did not make the shards in {self.sources[0].path}, but {found}: leave it out, or "
                "tokenize the text anew",
            )

    def _check_made(self, recall: bool) -> None:
        """Refuse shards that were made of `source` with other options than the recipe's."""
        text, found = self.text, self.index().tokenizer or ""
        length = text.length or (mqar.LENGTH if recall else LENGTH)
        wanted: dict[str, tuple[object, object]] = {"text.length": (length, self.index().length)}
        wanted["text.val_length"] = text.val_length or length, self.index("val").length
        if recall:
            wanted["source"] = mqar.NAME, found
        for key, (asked, there) in wanted.items():
            if asked != there:
                raise UserError(
                    key,
                    f"{asked} is not what the shards in {self.path} were made with, {there}: remove them, or "
                    "set another `data.path`",
                )

    @cached_property
    def _opened(self) -> Tokenizer | None:
        index = self.index()
        return (
            None
            if index.tokenizer in (None, mqar.NAME)
            else find_tokenizer(self.sources[0].path, index, self.remote)
        )

    @property
    def _vocabulary(self) -> int | None:
        if self.vocabulary is not None:
            return self.vocabulary
        if self.index().tokenizer == mqar.NAME:
            return mqar.VOCABULARY
        return None if self._opened is None else self._opened.vocabulary

    def save_tokenizer(self, folder: str | Path) -> None:
        """Copy the tokenizer's files, if it has any, into an existing folder. Raises DataError."""
        if self._opened is not None:
            self._opened.save(folder)

    def facts(self) -> dict[str, Any]:
        """Return the kind, row lengths, tokenizer, vocabulary, and the UTF-8 bytes of every id.

        length, val_length: tokens of a row of train and of val. token_bytes: int64 (vocabulary,).
        vocabulary and token_bytes are None where neither the recipe nor a tokenizer gives them.
        """
        index, val = self.index(), self.splits("val")
        facts = {
            "kind": "tokens",
            "length": index.length,
            "val_length": val[0].index.length if val else None,
            "tokenizer": index.tokenizer,
        }
        return facts | {
            "vocabulary": self._vocabulary,
            "token_bytes": None if self._opened is None else self._opened.token_bytes,
        }
