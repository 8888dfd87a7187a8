"""Text to token shards: the same inputs and options give the same bytes, with any number of workers and
however often it was interrupted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mhla_lightning.data.index import MAX_LENGTH, ShardIndex
from mhla_lightning.data.prepare.pack import PackOptions, Progress, check_target, fill, fingerprint_of, plan
from mhla_lightning.data.prepare.replacing import Note, build, demand_free
from mhla_lightning.data.prepare.sources.base import SampleSource
from mhla_lightning.data.prepare.text.chunks import TokenizedCorpus, documents_path, tokenize_chunks
from mhla_lightning.data.prepare.text.inputs import Input, folder_of, open_inputs
from mhla_lightning.data.prepare.text.layout import check_packing, held_out, lay_out
from mhla_lightning.data.prepare.text.rows import Rows, write_firsts, write_layout
from mhla_lightning.data.tokenizers import Tokenizer, open_tokenizer
from mhla_lightning.errors import DataError, UserError

LENGTH, VAL = 2048, 0.01
SPLITS = ("train", "val")


@dataclass(frozen=True)
class TextOptions:
    """What decides, with the inputs, which bytes are written.

    tokenizer: see open_tokenizer. length: tokens a row; val_length: of the val split, None is the same.
        packing: best-fit or concatenate.
    val: documents (int) or share of them (float below 1) held out. column: of JSON lines, parquet and hf.
        seed: of the order of rows and of the
    documents held out. shards: number of training shards.
    """

    tokenizer: str = "bytes"
    length: int = LENGTH
    val_length: int | None = None
    packing: str = "best-fit"
    val: int | float = VAL
    column: str = "text"
    seed: int = 0
    shards: int | None = None

    def __post_init__(self) -> None:
        """Raise UserError for a length, packing or number of shards that cannot be."""
        check_packing(self.packing)
        for name, value in (("--length", self.length), ("--val-length", self.val_length)):
            if value is not None and not 2 <= value <= MAX_LENGTH:
                raise UserError(f"{name} is {value}; it must be a number of tokens from 2 to {MAX_LENGTH}")
        if not self.val > 0:
            raise UserError(
                f"--val is {self.val}; it must be a number of documents, or a share above 0 and below 1"
            )
        PackOptions(shards=self.shards)

    def length_of(self, split: str) -> int:
        """Tokens a row of a split."""
        return self.val_length if split == "val" and self.val_length is not None else self.length


@dataclass(frozen=True)
class SplitReport:
    """What a split holds. bytes: of its documents in UTF-8. padding: share of its places. dropped: tokens
    that filled no row.
    """

    documents: int
    tokens: int
    bytes: int
    padding: float
    dropped: int


@dataclass(frozen=True)
class TokenizeReport:
    """indices, splits: by name. binary: files that are no text; empty: documents without any: both left out.
    made: tokens made in `seconds` by this call, which may have found others made."""

    indices: dict[str, ShardIndex]
    splits: dict[str, SplitReport]
    binary: int
    empty: int
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
    """Write text as token shards under `to`. inputs: see open_inputs. overwrite, workers, wait, on_note: see
    pack.

    A tokenizer with a file is kept as to/tokenizer.json, and named by its content in the index. Raises
    UserError for a bad argument or a target in use, DataError for an input that cannot be read, Interrupted
    for what the same call can continue.
    """
    target = _target(inputs, to)
    if workers < 1:
        raise UserError(f"--workers is {workers}; it must be at least 1")
    demand_free(target, overwrite)
    tokenizer = open_tokenizer(options.tokenizer)
    if tokenizer.end is None:
        raise UserError(
            f"the tokenizer {options.tokenizer} names no token that ends a document: give it an "
            "eos_token in tokenizer_config.json"
        )
    sources = open_inputs(inputs, options.column)
    fingerprint = fingerprint_of(
        [source.fingerprint for source in sources], tokenizer.name, tokenizer.end, repr(options)
    )
    progress, note = on_progress or (lambda *_: None), on_note or (lambda _: None)
    with build(target, fingerprint, SPLITS, overwrite, wait, note) as building:
        folder = building.folder / "tokens"
        chunks = tokenize_chunks(
            sources, folder, tokenizer, workers, lambda done, total: progress("tokenize", done, total), note
        )
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
    return TokenizeReport(indices, reports, binary, empty, chunks.made, chunks.seconds)


def _target(inputs: Sequence[str], to: str | Path) -> Path:
    for spec in inputs:
        check_target(folder_of(str(spec)), to)
    return check_target(None, to)


def _lay_out(
    folder: Path, chunks: TokenizedCorpus, tokenizer: Tokenizer, options: TextOptions, inputs: Sequence[Input]
) -> tuple[SampleSource, dict[str, SplitReport]]:
    """The splits as parts of a source, and a report of each."""
    documents = np.concatenate(
        [
            np.zeros((0, 2), np.int64),
            *(np.load(documents_path(folder, chunk.number)) for chunk in chunks.found),
        ]
    )
    if not len(documents):
        binary = sum(chunk.binary for chunk in chunks.found)
        raise DataError(
            f"{', '.join(source.name for source in inputs[:3])}: no text was found ({binary} binary "
            "files, the rest empty)"
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
                "a smaller --length or --val"
                if split == "train"
                else "a larger --val, or a smaller --val-length"
            )
            found = f"the {split} split has {tokens.sum()} tokens in {len(tokens)} documents"
            raise DataError(f"{found}, less than a row of {lengths[split]}: choose {more}")
        write_layout(folder, split, layout)
        source.parts[split] = Rows(
            source.header_of(split), tokenizer.vocabulary, folder, split, np.arange(rows)
        )
        padding = 1 - float(layout.lengths.sum()) / (rows * lengths[split])
        reports[split] = SplitReport(len(tokens), int(tokens.sum()), int(size.sum()), padding, layout.dropped)
    return source, reports
