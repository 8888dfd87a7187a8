"""Documents to tokens: many processes, each writing whole chunks; a chunk that is finished is not made again.

FOLDER/000007.npy             token ids, uint16 or uint32 (tokens,), the documents one after another, each
with its end FOLDER/000007.documents.npy   int64 (documents, 2): tokens with the end, and UTF-8 bytes of each
FOLDER/000007.json            what is in the chunk; written last
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path

import numpy as np

from mhla_lightning.data.prepare.parallel import Interrupted, run_jobs
from mhla_lightning.data.prepare.replacing import Note, sync
from mhla_lightning.data.prepare.text.documents import Group
from mhla_lightning.data.prepare.text.inputs import Input
from mhla_lightning.data.tokenizers import Tokenizer, open_tokenizer

LEAST_BYTES, MOST_BYTES, CHUNKS = 2**20, 2**24, 64  # of a chunk's text; chunks of a small corpus
_STRETCH = 2**22  # characters that are encoded at once: the package tokenizers takes a hundred bytes for each


@dataclass(frozen=True)
class Chunk:
    """binary: files that are no text; empty: documents without any; size: bytes of input."""

    number: int
    documents: int
    tokens: int
    binary: int
    empty: int
    size: int


@dataclass(frozen=True)
class TokenizedCorpus:
    """All chunks of a corpus in order; made: tokens made by this call, in so many seconds."""

    found: list[Chunk]
    made: int
    seconds: float


@dataclass(frozen=True)
class ChunkJob:
    folder: Path
    number: int
    group: Group
    tokenizer: str  # what open_tokenizer takes
    identity: str  # a folder may be made anew with another tokenizer


def token_type(vocabulary: int) -> np.dtype:
    """In which integers ids are stored."""
    return np.dtype("<u2" if vocabulary <= 2**16 else "<u4")


def tokenize_chunks(
    inputs: Sequence[Input],
    folder: Path,
    tokenizer: Tokenizer,
    workers: int,
    on_progress: Callable[[int, int], None],
    on_note: Note,
) -> TokenizedCorpus:
    """Tokenize all documents into chunks in `folder`, but for the chunks that are there. on_progress: input
    bytes done, and in all.

    Raises DataError for a document that cannot be read, Interrupted for what the same call can continue.
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
            on_progress(min(total, sum(known.size for known in found.values())), total)
    on_progress(total, total)
    return TokenizedCorpus([found[number] for number in sorted(found)], made, time.perf_counter() - start)


def chunk_path(folder: Path, number: int) -> Path:
    """The tokens of a chunk."""
    return folder / f"{number:06d}.npy"


def documents_path(folder: Path, number: int) -> Path:
    """The documents of a chunk."""
    return folder / f"{number:06d}.documents.npy"


def _finished(folder: Path, number: int) -> Chunk | None:
    try:
        return Chunk(**json.loads((folder / f"{number:06d}.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _tokenize(job: ChunkJob) -> Chunk:
    tokenizer = _opened(job.tokenizer, job.identity)
    dtype, end = token_type(tokenizer.vocabulary), np.array([tokenizer.end])
    arrays, sizes, binary, empty = [], [], 0, 0
    for text in job.group.texts():
        if not text:
            binary, empty = binary + (text is None), empty + (text is not None)
            continue
        parts = [*(tokenizer.encode_array(part) for part in _stretches(text)), end]
        arrays += [part.astype(dtype) for part in parts]
        sizes.append((sum(map(len, parts)), len(text.encode())))
    tokens = np.concatenate(arrays) if arrays else np.zeros(0, dtype)
    chunk = Chunk(job.number, len(sizes), len(tokens), binary, empty, job.group.size)
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
        parts[-1].write_text(json.dumps(asdict(chunk)))
        for part, path in zip(parts, paths, strict=True):
            sync(part)
            part.rename(path)
    except OSError as error:
        raise Interrupted(
            f"{folder} cannot be written ({error.strerror or error}): run the same command again "
            "when that is solved"
        ) from error


@lru_cache(maxsize=1)
def _opened(spec: str, identity: str) -> Tokenizer:
    return open_tokenizer(spec)


def _stretches(text: str) -> Iterator[str]:
    """A document in pieces that can be encoded in little memory, cut where a line begins."""
    start = 0
    while len(text) - start > _STRETCH:
        cut = text.rfind("\n", start + 1, start + _STRETCH)
        cut = start + _STRETCH if cut < 0 else cut
        yield text[start:cut]
        start = cut
    yield text[start:]
