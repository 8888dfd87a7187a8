"""A byte-level BPE of one's own text: every text can be encoded, and decodes to itself."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from mhla_lightning.data.prepare.text.chunks import MOST_BYTES
from mhla_lightning.data.prepare.text.documents import MAX_SKIPPED_SHARE, RowTally, check_share
from mhla_lightning.data.prepare.text.inputs import open_inputs
from mhla_lightning.data.prepare.text.readers import Input
from mhla_lightning.data.tokenizers import Tokenizer, open_tokenizer
from mhla_lightning.errors import DataError, UserError, missing_extra

END = "<|endoftext|>"
LEAST = 257  # all bytes, and the end of a document
_PROBED = 200  # documents on which bytes per token are measured


@dataclass(frozen=True)
class TrainedTokenizer:
    """A tokenizer that was learned.

    Args:
        tokenizer: as it was written.
        documents: number of documents.
        bytes: of the text in UTF-8.
        bytes_per_token: on the first documents.
        skipped: the rows that cannot be read, which were left out.
        taken: number of files by what they were taken for.
        left_out: (file, reason) of the others.
    """

    tokenizer: Tokenizer
    documents: int
    bytes: int
    bytes_per_token: float
    skipped: RowTally
    taken: dict[str, int]
    left_out: list[tuple[str, str]]


def train_tokenizer(
    inputs: Sequence[str],
    to: str | Path,
    vocabulary: int,
    text_column: str = "text",
    overwrite: bool = False,
    max_skipped_share: float = MAX_SKIPPED_SHARE,
    on_progress: Callable[[int, int], None] | None = None,
) -> TrainedTokenizer:
    """Learn a tokenizer.json from text and write it to the file `to`.

    The same text gives the same file.

    Args:
        inputs: see inputs.open_inputs.
        to: the file.
        vocabulary: number of ids.
        text_column: of JSON, CSV, parquet and hf; `a.b` is the key b inside a.
        overwrite: replace the file.
        max_skipped_share: of rows that cannot be read; more of them end the work.
        on_progress: called with the input bytes read, and of all.

    Raises:
        UserError: a bad argument.
        DataError: an input that cannot be read, or holds no text.
    """
    target = Path(to).expanduser()
    _check(target, vocabulary, overwrite)
    check_share(max_skipped_share)
    _demand_tokenizers()
    opened, rows = open_inputs(inputs, text_column), RowTally()
    sources = opened.sources
    total, counts = sum(source.size for source in sources), {"documents": 0, "bytes": 0}
    progress = on_progress or (lambda *_: None)

    def texts() -> Iterator[str]:
        done = 0
        for group in (group for source in sources for group in source.groups(MOST_BYTES // 8)):
            for text in group.texts():
                rows.add(text)
                if not isinstance(text, str) or not text:
                    continue
                counts["documents"] += 1
                counts["bytes"] += len(text.encode())
                yield text
            done += group.size
            rows.demand_any()
            progress(min(done, total), total)

    content = _learn(texts(), vocabulary)
    rows.judge(max_skipped_share)
    if not counts["documents"]:
        raise DataError(", ".join(map(str, inputs)), "no text was found")
    _write(target, content)
    tokenizer = open_tokenizer(str(target))
    rate = _bytes_per_token(sources, tokenizer)
    return TrainedTokenizer(
        tokenizer, counts["documents"], counts["bytes"], rate, rows, opened.taken, opened.left_out
    )


def _demand_tokenizers() -> None:
    try:
        import tokenizers  # noqa: F401
    except ImportError as error:
        raise UserError("inputs", missing_extra("tokenizers", "language", "training a tokenizer")) from error


def _learn(texts: Iterator[str], vocabulary: int) -> str:
    """Return the content of the tokenizer.json of a byte-level BPE, learnt from texts."""
    from tokenizers import Tokenizer as Core
    from tokenizers import decoders, models, pre_tokenizers, trainers

    core = Core(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    return core.to_str(pretty=True)


def _bytes_per_token(sources: Sequence[Input], tokenizer: Tokenizer) -> float:
    """Return how many bytes of the first texts a token stands for, on average."""
    groups = (group for source in sources for group in source.groups(1))
    texts = (text for group in groups for text in group.texts())
    probe = list(islice((text for text in texts if text and isinstance(text, str)), _PROBED))
    return sum(len(text.encode()) for text in probe) / sum(map(len, tokenizer.encode_many(probe)))


def _check(target: Path, vocabulary: int, overwrite: bool) -> None:
    if vocabulary < LEAST or vocabulary > 2**24:
        raise UserError(
            "vocabulary", f"got {vocabulary}; it must be from {LEAST} (all bytes and {END}) to {2**24}"
        )
    if target.suffix != ".json":
        raise UserError(
            "to", f"{target} must be a file that ends in .json, for example {target / 'tokenizer.json'}"
        )
    if target.exists() and not overwrite:
        raise UserError(str(target), "exists; choose another file, or pass `overwrite`")
    if not target.absolute().parent.is_dir():
        raise UserError("to", f"there is no folder {target.absolute().parent} for {target.name}")


def _write(target: Path, content: str) -> None:
    part = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        part.write_text(content, encoding="utf-8")
        part.rename(target)
    except OSError as error:
        raise UserError(str(target), f"cannot be written ({error.strerror or error})") from error
