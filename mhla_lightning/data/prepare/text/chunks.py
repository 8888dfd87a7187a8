"""Documents to tokens, in chunks that several processes make.

Finished chunks are kept when the work is interrupted. The files of a chunk, the last one written last:

    FOLDER/000007.npy             token ids, uint16 or uint32 (tokens,): documents with their ends
    FOLDER/000007.documents.npy   int64 (documents, 2): tokens with the end, and UTF-8 bytes of each
    FOLDER/000007.json            facts about the chunk
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import chain
from pathlib import Path

import numpy as np

from mhla_lightning.data.prepare.parallel import Interrupted, run_jobs
from mhla_lightning.data.prepare.replacing import Note, sync
from mhla_lightning.data.prepare.text.documents import BadRow, Group, RowTally
from mhla_lightning.data.prepare.text.readers import Input
from mhla_lightning.data.tokenizers import Tokenizer, open_tokenizer

LEAST_BYTES, MOST_BYTES = 2**20, 2**24  # of a chunk's text
CHUNKS = 64  # of a small corpus
_PIECE = 2**20  # bytes read at once
_STRETCH = 2**22  # characters encoded at once; the package tokenizers takes a hundred bytes for each


@dataclass(frozen=True)
class Chunk:
    """Facts about a chunk.

    Args:
        number: of the chunk.
        documents: number of documents with text.
        tokens: number of tokens.
        binary: number of files that are no text.
        empty: number of documents without text.
        size: bytes of input.
        bad: number of rows that cannot be read.
        first_bad: source of the first of them, and the reason.
        crc32: checksum of the files of tokens and of documents.
    """

    number: int
    documents: int
    tokens: int
    binary: int
    empty: int
    size: int
    bad: int = 0
    first_bad: Sequence[str] = ()
    crc32: int = 0


@dataclass(frozen=True)
class TokenizedCorpus:
    """All chunks of a corpus.

    Args:
        found: the chunks in order.
        made: number of tokens made by this call.
        seconds: that it took.
    """

    found: list[Chunk]
    made: int
    seconds: float


@dataclass(frozen=True)
class ChunkJob:
    """A chunk to make.

    Args:
        folder: of the chunks.
        number: of the chunk.
        group: its documents.
        tokenizer: an argument of open_tokenizer.
        identity: of the tokenizer; a folder may get another one.
    """

    folder: Path
    number: int
    group: Group
    tokenizer: str
    identity: str


def token_type(vocabulary: int) -> np.dtype:
    """Return the integer type that stores the ids of a vocabulary."""
    return np.dtype("<u2" if vocabulary <= 2**16 else "<u4")


def tokenize_chunks(
    inputs: Sequence[Input],
    folder: Path,
    tokenizer: Tokenizer,
    workers: int,
    on_progress: Callable[[int, int], None],
    on_note: Note,
) -> TokenizedCorpus:
    """Tokenize all documents into chunks in `folder`; chunks that exist are kept.

    Args:
        inputs: of the documents.
        folder: of the chunks.
        tokenizer: saved in the folder.
        workers: processes.
        on_progress: called with the input bytes done, and of all.
        on_note: called with remarks for the user.

    Raises:
        DataError: a document that cannot be read.
        Interrupted: work that the same call can continue.
    """
    folder.mkdir(exist_ok=True)
    tokenizer.save(folder)
    total = sum(source.size for source in inputs)
    wanted = min(max(total // CHUNKS, LEAST_BYTES), MOST_BYTES)
    found: dict[int, Chunk] = {}
    opened = str(folder) if tokenizer.files else tokenizer.name

    def jobs() -> Iterator[ChunkJob]:
        for number, group in enumerate(chain.from_iterable(source.groups(wanted) for source in inputs)):
            kept = _finished(folder, number)
            if kept is not None:
                found[number] = kept
            else:
                yield ChunkJob(folder, number, group, opened, tokenizer.name)

    start, made = time.perf_counter(), 0
    kept = len(list(folder.glob("*.json"))) - len(tokenizer.files)
    if kept:
        on_note(f"{kept} chunks were tokenized before and are kept")
    on_progress(0, total)
    with closing(run_jobs(_tokenize, jobs(), workers)) as results:
        for chunk in results:
            found[chunk.number] = chunk
            made += chunk.tokens
            if chunk.bad:
                tally_of(found.values()).demand_any()
            on_progress(min(total, sum(known.size for known in found.values())), total)
    on_progress(total, total)
    return TokenizedCorpus([found[number] for number in sorted(found)], made, time.perf_counter() - start)


def tally_of(chunks: Iterable[Chunk]) -> RowTally:
    """Count the rows of chunks, and those that cannot be read."""
    tally = RowTally()
    for chunk in sorted(chunks, key=lambda chunk: chunk.number):
        tally.rows += chunk.documents + chunk.empty + chunk.bad
        tally.bad += chunk.bad
        if chunk.bad and tally.first is None:
            tally.first = BadRow(*chunk.first_bad)
    return tally


def chunk_path(folder: Path, number: int) -> Path:
    """Return the file of the tokens of a chunk."""
    return folder / f"{number:06d}.npy"


def documents_path(folder: Path, number: int) -> Path:
    """Return the file of the documents of a chunk."""
    return folder / f"{number:06d}.documents.npy"


def _finished(folder: Path, number: int) -> Chunk | None:
    try:
        chunk = Chunk(**json.loads((folder / f"{number:06d}.json").read_bytes()))
        found = _crc32([chunk_path(folder, number), documents_path(folder, number)])
        return chunk if found == chunk.crc32 else None
    except (OSError, ValueError, TypeError):
        return None


def _crc32(files: Sequence[Path]) -> int:
    value = 0
    for path in files:
        with path.open("rb") as file:
            while part := file.read(_PIECE):
                value = zlib.crc32(part, value)
    return value


def _tokenize(job: ChunkJob) -> Chunk:
    tokenizer = _opened(job.tokenizer, job.identity)
    dtype, end = token_type(tokenizer.vocabulary), np.array([tokenizer.end])
    arrays, sizes, binary, empty = [], [], 0, 0
    bad: list[BadRow] = []
    for text in job.group.texts():
        if isinstance(text, BadRow):
            bad.append(text)
            continue
        if not text:
            binary, empty = binary + (text is None), empty + (text is not None)
            continue
        parts = [*(tokenizer.encode_array(part) for part in _stretches(text)), end]
        arrays += [part.astype(dtype) for part in parts]
        sizes.append((sum(map(len, parts)), len(text.encode())))
    tokens = np.concatenate(arrays) if arrays else np.zeros(0, dtype)
    first = (bad[0].source, bad[0].reason) if bad else ()
    chunk = Chunk(job.number, len(sizes), len(tokens), binary, empty, job.group.size, len(bad), first)
    _write(job.folder, chunk, tokens, np.array(sizes, dtype=np.int64).reshape(-1, 2))
    return chunk


def _write(folder: Path, chunk: Chunk, tokens: np.ndarray, documents: np.ndarray) -> None:
    paths = [
        chunk_path(folder, chunk.number),
        documents_path(folder, chunk.number),
        folder / f"{chunk.number:06d}.json",
    ]
    parts = [path.with_name(f"{path.name}.part") for path in paths]
    try:
        for part, array in zip(parts, (tokens, documents), strict=False):
            with open(part, "wb") as file:
                np.save(file, array, allow_pickle=False)
        parts[-1].write_text(json.dumps(asdict(replace(chunk, crc32=_crc32(parts[:-1])))))
        for part, path in zip(parts, paths, strict=True):
            sync(part)
            part.rename(path)
    except OSError as error:
        raise Interrupted(
            str(folder),
            f"cannot be written ({error.strerror or error}); run the same command again when that is solved",
        ) from error


@lru_cache(maxsize=1)
def _opened(spec: str, identity: str) -> Tokenizer:
    return open_tokenizer(spec)


def _stretches(text: str) -> Iterator[str]:
    """Cut a document into pieces that can be encoded in little memory, where a line begins."""
    start = 0
    while len(text) - start > _STRETCH:
        cut = text.rfind("\n", start + 1, start + _STRETCH)
        cut = start + _STRETCH if cut < 0 else cut
        yield text[start:cut]
        start = cut
    yield text[start:]
