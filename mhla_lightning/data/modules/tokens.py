"""The LightningDataModule of packed token sequences."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from mhla_lightning.data.check import Verify
from mhla_lightning.data.corpus import Source
from mhla_lightning.data.index import INDEX_NAME, SPLITS, ShardIndex
from mhla_lightning.data.kinds import Tokens
from mhla_lightning.data.loader import Loading
from mhla_lightning.data.modules.base import ShardDataModule
from mhla_lightning.data.order import LANES, WINDOW
from mhla_lightning.data.prepare.sources import mqar
from mhla_lightning.data.prepare.text.layout import Packing
from mhla_lightning.data.prepare.text.tokenize import LENGTH, VAL, TextOptions
from mhla_lightning.data.stores import Remote
from mhla_lightning.data.tokenizers import Tokenizer, find_tokenizer, open_tokenizer, same_tokenizer
from mhla_lightning.errors import DataError, UserError


class TokenDataModule(ShardDataModule):
    """Rows of tokens with document numbers, from shards.

    Args:
        path, batch_size, micro_batch_size, epochs, num_workers, mix: see :class:`ShardDataModule`.
        vocabulary: number of token ids; a row with a larger id is skipped and counted. None takes the
            tokenizer's, or any where there is none.
        source: packed into `path` by prepare_data when `path` holds no shards yet: stdlib, files, a folder
            (see mhla data tokenize), mqar[:PAIRS].
        tokenizer: bytes, a tokenizer.json, or a Hugging Face name: of `source` (None is bytes), or what
            shards that are there must be made with.
        length: tokens a row. This and the next three describe what is made of `source`. None is 2048, 128 for
            mqar.
        val_length: tokens a row of the val split. None is the same.
        packing: best-fit or concatenate.
        val: documents (rows for mqar) or share of them held out. None is 0.01, 1000 rows for mqar.
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
        source: str | None = None,
        tokenizer: str | None = None,
        length: int | None = None,
        val_length: int | None = None,
        packing: Packing = "best-fit",
        val: int | float | None = None,
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
            path,
            batch_size,
            micro_batch_size,
            epochs,
            num_workers,
            mix,
            lanes,
            window,
            seed,
            max_skipped_share,
            verify,
            loading,
            remote,
        )
        self._take_source(source, path)
        self.vocabulary, self.tokenizer, self.length, self.val_length, self.val = (
            vocabulary,
            tokenizer,
            length,
            val_length,
            val,
        )
        if source is not None and mqar.is_mqar(source):
            self._recall(source)
        elif source is not None:
            self._text = TextOptions(
                tokenizer or "bytes", length or LENGTH, val_length, packing, VAL if val is None else val
            )

    def _recall(self, source: str) -> Any:
        val = {} if self.val is None else {"val": self.val}
        # # it refuses a share
        return mqar.open_mqar(source, self.length or mqar.LENGTH, self.val_length, **val)  # type: ignore[arg-type]

    def _pack(self, source: str, folder: Path) -> None:
        from mhla_lightning.data.prepare.pack import pack
        from mhla_lightning.data.prepare.parallel import default_workers
        from mhla_lightning.data.prepare.text.tokenize import tokenize

        if mqar.is_mqar(source):
            pack(self._recall(source), folder)
        else:
            tokenize([source], folder, self._text, workers=default_workers())
        self.__dict__.pop("_opened", None)

    def kind(self, index: ShardIndex) -> Tokens:
        """Rows of this split's length."""
        return Tokens(index.length or 0, self._vocabulary)

    def check(self, world_size: int) -> None:
        """Also that all splits were made by the same tokenizer, those of one name with rows of one length,
        and as `source` is to be packed.
        """
        super().check(world_size)
        for name in SPLITS:
            for split in self.splits(name):
                address = split.store.address(INDEX_NAME)
                if not same_tokenizer(split.index.tokenizer, self.index().tokenizer):
                    found = f"{address} was made with the tokenizer {split.index.tokenizer}"
                    raise DataError(
                        f"{found}, and {self.sources[0].path} with {self.index().tokenizer}: "
                        "tokenize both with the same"
                    )
                Tokens(self.index(name).length or 0).check(split.index, address)
        recall = self.source is not None and mqar.is_mqar(self.source)
        if not recall and (self.tokenizer or self.source) is not None:
            self._check_tokenizer(self.tokenizer or "bytes")
        if self.source is not None:
            self._check_made(recall)

    def _check_tokenizer(self, named: str) -> None:
        """Refuse shards of another tokenizer than the one named: they would be trained on, and the recipe
        would say what is not so.
        """
        found, file = self.index().tokenizer or "none", Path(named).expanduser()
        if named == "bytes" or file.exists():
            same = same_tokenizer(found, open_tokenizer(named).name)
        else:  # a name, whose content is not fetched again
            same = file.suffix == ".json" or found.partition(" sha256:")[0] == named
        if not same:
            raise UserError(
                f"data.tokenizer is {named}, and the shards in {self.sources[0].path} were made with "
                f"{found}: leave it out, or tokenize the text anew"
            )

    def _check_made(self, recall: bool) -> None:
        """Refuse shards that were made of `source` with other options: they would be trained on as if they
        were what the recipe says.
        """
        length, found = self.length or (mqar.LENGTH if recall else LENGTH), self.index().tokenizer or ""
        wanted: dict[str, tuple[object, object]] = {"length": (length, self.index().length)}
        wanted["val_length"] = self.val_length or length, self.index("val").length
        if recall:
            wanted["source"] = mqar.NAME, found
        for key, (asked, there) in wanted.items():
            if asked != there:
                raise UserError(
                    f"data.{key} is {asked}, and the shards in {self.path} were made with {there}: "
                    "remove them, or set another data.path"
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
        """Copy the tokenizer's files, if it has any, into an existing folder. Raises UserError."""
        if self._opened is not None:
            self._opened.save(folder)

    def facts(self) -> dict[str, Any]:
        """Kind, tokens a row of train and val, the tokenizer's name, vocabulary, and the UTF-8 bytes of every
        id, int64 (vocabulary,).

        vocabulary and token_bytes are None where neither the recipe nor a tokenizer says them.
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
