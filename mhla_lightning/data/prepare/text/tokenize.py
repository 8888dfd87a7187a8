"""Text to token shards.

The same inputs and options give the same bytes, with any number of workers and however often the work was
interrupted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mhla_lightning.data.index import MAX_LENGTH, ShardIndex
from mhla_lightning.data.prepare.pack import PackOptions, Progress, check_target, fill, fingerprint_of, plan
from mhla_lightning.data.prepare.parallel import Interrupted, check_workers
from mhla_lightning.data.prepare.replacing import Note, build, demand_free
from mhla_lightning.data.prepare.sources.base import SampleSource
from mhla_lightning.data.prepare.text.chunks import TokenizedCorpus, documents_path, tally_of, tokenize_chunks
from mhla_lightning.data.prepare.text.documents import MAX_SKIPPED_SHARE, RowTally, check_share
from mhla_lightning.data.prepare.text.inputs import folder_of, open_inputs
from mhla_lightning.data.prepare.text.layout import check_packing, held_out, lay_out
from mhla_lightning.data.prepare.text.readers import Input
from mhla_lightning.data.prepare.text.rows import Rows, write_firsts, write_layout
from mhla_lightning.data.tokenizers import Tokenizer, open_tokenizer
from mhla_lightning.errors import DataError, UserError

LENGTH, VAL = 2048, 0.01
SPLITS = ("train", "val")


@dataclass(frozen=True)
class TextOptions:
    """The choices that decide, with the inputs, which bytes are written.

    Args:
        tokenizer: see open_tokenizer.
        length: tokens a row.
        val_length: tokens a row of the val split; None is the same.
        packing: best-fit or concatenate.
        val: documents (int) or share of them (float below 1) held out.
        text_column: of JSON, CSV, parquet and hf; `a.b` is the key b inside a.
        seed: of the order of rows and of the documents held out.
        shards: number of training shards; None takes enough for 512 MB each, at least 16.
        max_skipped_share: of rows that cannot be read; more of them end the work.
    """

    tokenizer: str = "bytes"
    length: int = LENGTH
    val_length: int | None = None
    packing: str = "best-fit"
    val: int | float = VAL
    text_column: str = "text"
    seed: int = 0
    shards: int | None = None
    max_skipped_share: float = MAX_SKIPPED_SHARE

    def __post_init__(self) -> None:
        """Raise UserError for a value outside its range."""
        check_packing(self.packing)
        for name, value in (("length", self.length), ("val_length", self.val_length)):
            if value is not None and not 2 <= value <= MAX_LENGTH:
                raise UserError(name, f"got {value}; it must be a number of tokens from 2 to {MAX_LENGTH}")
        if not self.val > 0:
            raise UserError(
                "val", f"got {self.val}; it must be a number of documents, or a share above 0 and below 1"
            )
        check_share(self.max_skipped_share)
        PackOptions(shards=self.shards)

    def length_of(self, split: str) -> int:
        """Return the tokens a row of a split."""
        return self.val_length if split == "val" and self.val_length is not None else self.length


@dataclass(frozen=True)
class SplitReport:
    """The content of a split.

    Args:
        documents: number of documents.
        tokens: number of tokens.
        bytes: of the documents in UTF-8.
        padding: share of the places in rows.
        dropped: number of tokens that filled no row.
    """

    documents: int
    tokens: int
    bytes: int
    padding: float
    dropped: int


@dataclass(frozen=True)
class TokenizeReport:
    """What was written.

    Args:
        indices: by split.
        splits: by name.
        binary: number of files that are no text and were left out.
        empty: number of documents without text, which were left out.
        skipped: the rows that cannot be read, which were left out.
        taken: number of files by what they were taken for.
        left_out: (file, reason) of the others.
        made: number of tokens that this call made; others may exist from an earlier one.
        seconds: that this took.
    """

    indices: dict[str, ShardIndex]
    splits: dict[str, SplitReport]
    binary: int
    empty: int
    skipped: RowTally
    taken: dict[str, int]
    left_out: list[tuple[str, str]]
    made: int
    seconds: float


def tokenize(
    inputs: Sequence[str],
    to: str | Path,
    options: TextOptions,
    *,
    overwrite: bool = False,
    workers: int = 1,
    wait: bool = True,
    on_progress: Progress | None = None,
    on_note: Note | None = None,
) -> TokenizeReport:
    """Write text as token shards under `to`.

    A tokenizer with a file is kept as to/tokenizer.json, and the index names it by its content.

    Args:
        inputs: see inputs.open_inputs.
        to: the folder to make.
        options: how text becomes tokens.
        overwrite: see pack.pack, also for the arguments that follow.
        workers: processes.
        wait: wait for another process that makes `to`.
        on_progress: called with a split, its samples done and its samples in all.
        on_note: called with remarks for the user.

    Raises:
        UserError: a bad argument, or a target in use.
        DataError: an input that cannot be read.
        Interrupted: work that the same call can continue.
    """
    target = _target(inputs, to)
    check_workers(workers)
    demand_free(target, overwrite)
    tokenizer = open_tokenizer(options.tokenizer)
    if tokenizer.end is None:
        raise UserError(
            "tokenizer",
            f"{options.tokenizer} names no token that ends a document; give it an eos_token in "
            "tokenizer_config.json",
        )
    opened = open_inputs(inputs, options.text_column)
    sources = opened.sources
    fingerprint = fingerprint_of(
        [source.fingerprint for source in sources],
        tokenizer.name,
        tokenizer.end,
        repr(replace(options, max_skipped_share=0.0)),  # a larger share goes on with the same chunks
    )
    progress, note = on_progress or (lambda *_: None), on_note or (lambda _: None)
    with build(target, fingerprint, SPLITS, overwrite, wait, note) as building:
        folder = building.folder / "tokens"
        chunks = tokenize_chunks(
            sources, folder, tokenizer, workers, lambda done, total: progress("tokenize", done, total), note
        )
        skipped = tally_of(chunks.found)
        _judge(skipped, options.max_skipped_share, len(chunks.found))
        source, reports = _lay_out(folder, chunks, tokenizer, options, sources)
        indices = fill(
            building,
            source,
            plan(source, PackOptions(None, options.shards, options.seed)),
            workers,
            progress,
            note,
        )
    binary, empty = (sum(getattr(chunk, name) for chunk in chunks.found) for name in ("binary", "empty"))
    return TokenizeReport(
        indices,
        reports,
        binary,
        empty,
        skipped,
        opened.taken,
        opened.left_out,
        chunks.made,
        chunks.seconds,
    )


def _judge(rows: RowTally, share: float, chunks: int) -> None:
    try:
        rows.judge(share)
    except DataError as error:
        if chunks > 1:  # hours of work; the same command with a larger share goes on with them
            raise Interrupted(error.key, error.reason) from error
        raise


def _target(inputs: Sequence[str], to: str | Path) -> Path:
    for spec in inputs:
        check_target(folder_of(str(spec)), to)
    return check_target(None, to)


def _lay_out(
    folder: Path, chunks: TokenizedCorpus, tokenizer: Tokenizer, options: TextOptions, inputs: Sequence[Input]
) -> tuple[SampleSource, dict[str, SplitReport]]:
    """Return the splits as parts of a source, and a report of each."""
    documents = np.concatenate(
        [
            np.zeros((0, 2), np.int64),
            *(np.load(documents_path(folder, chunk.number)) for chunk in chunks.found),
        ]
    )
    if not len(documents):
        binary = sum(chunk.binary for chunk in chunks.found)
        raise DataError(
            ", ".join(source.name for source in inputs[:3]),
            f"no text was found ({binary} binary files, the rest empty)",
        )
    write_firsts(folder, [chunk.tokens for chunk in chunks.found])
    ends = np.cumsum(documents[:, 0])
    outside = held_out(len(documents), options.val, options.seed)
    header = ShardIndex("tokens", (), tokenizer=tokenizer.name, length=options.length)
    lengths = {split: options.length_of(split) for split in SPLITS}
    source = SampleSource(header, {}, "", lengths, dict(tokenizer.files))
    reports = {}
    for split, chosen in (("train", ~outside), ("val", outside)):
        tokens, size = documents[chosen, 0], documents[chosen, 1]
        layout = lay_out(options.packing, (ends - documents[:, 0])[chosen], tokens, lengths[split])
        rows = len(layout.rows) - 1
        if not rows:
            more = (
                "a smaller `length` or `val`"
                if split == "train"
                else "a larger `val`, or a smaller `val_length`"
            )
            found = f"the {split} split has {tokens.sum()} tokens in {len(tokens)} documents"
            raise DataError(
                "length" if split == "train" else "val",
                f"{found}, less than a row of {lengths[split]}; choose {more}",
            )
        write_layout(folder, split, layout)
        source.parts[split] = Rows(
            source.header_of(split), tokenizer.vocabulary, folder, split, np.arange(rows)
        )
        padding = 1 - float(layout.lengths.sum()) / (rows * lengths[split])
        reports[split] = SplitReport(len(tokens), int(tokens.sum()), int(size.sum()), padding, layout.dropped)
    return source, reports
