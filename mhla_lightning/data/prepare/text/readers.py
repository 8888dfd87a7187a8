"""Readers of text files of every kind, which yield documents in groups."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from mhla_lightning.data.prepare.text.compression import opened
from mhla_lightning.data.prepare.text.documents import (
    BadRow,
    Document,
    Files,
    Group,
    Lines,
    RowGroup,
    Texts,
    open_parquet,
    text_of,
)
from mhla_lightning.data.prepare.text.formats import (
    Format,
    json_values,
    table_rows,
)
from mhla_lightning.errors import DataError, UserError, missing_extra
from mhla_lightning.textfiles import stream_encoding

_MOST_FILES, _MOST_ROWS = 2**12, 2**16  # in a group


@dataclass(frozen=True)
class Input:
    """A source of documents.

    Args:
        name: for messages.
        size: in bytes, for the progress bar.
        fingerprint: changes when the documents do.
        groups: yields the documents in groups of about the wanted bytes, always the same ones.
    """

    name: str
    size: int
    fingerprint: str
    groups: Callable[[int], Iterator[Group]] = field(repr=False)


def text_files(name: str, paths: list[Path]) -> Input:
    """Open plain text files, each of which is a document."""
    sizes = [_stat(path).st_size for path in paths]

    def groups(wanted: int) -> Iterator[Group]:
        members: list[Path] = []
        size = 0
        for path, own in zip(paths, sizes, strict=True):
            members.append(path)
            size += own
            if size >= wanted or len(members) == _MOST_FILES:
                yield Files(members, size)
                members, size = [], 0
        if members:
            yield Files(members, size)

    return Input(name, sum(sizes), _fingerprint("text", paths), groups)


def json_lines(path: Path, encoding: str, text_column: str) -> Input:
    """Open JSON with a row a line; workers read the rows."""

    def groups(wanted: int) -> Iterator[Group]:
        lines: list[bytes] = []
        first, size, before = 1, 0, 0
        with opened(path) as (raw, plain):
            for line in _lines(plain, encoding):
                lines.append(line)
                size += len(line)
                if size >= wanted:
                    at = raw.tell()
                    yield Lines(path, first, lines, text_column, at - before)
                    first, lines, size, before = first + len(lines), [], 0, at
            if lines:
                yield Lines(path, first, lines, text_column, raw.tell() - before)

    return Input(str(path), _stat(path).st_size, _fingerprint("lines", [path], text_column), groups)


def _lines(plain: IO[bytes], encoding: str) -> Iterator[bytes]:
    if encoding == "utf-8":
        yield from iter(plain.readline, b"")  # iterating over a file forbids tell()
    else:
        with _as_text(plain, encoding) as text:
            for line in text:
                yield line.encode()


@contextmanager
def _as_text(plain: IO[bytes], encoding: str) -> Iterator[IO[str]]:
    """Give the block a stream as text, with its line ends.

    Bytes that are no UTF-8 become lone surrogates.
    """
    errors = "surrogateescape" if encoding == "utf-8" else "replace"
    text = io.TextIOWrapper(plain, stream_encoding(encoding), errors, newline="")
    try:
        yield text
    finally:
        text.detach()  # or it would close the stream when it is collected


def rows(path: Path, form: Format, text_column: str) -> Input:
    """Open JSON of several lines a row, CSV or TSV.

    This process reads it, since a worker could not find where its rows begin.
    """

    def documents(text: IO[str]) -> Iterator[Document]:
        if form.kind == "JSON":
            for place, row, reason in json_values(text):
                bad = BadRow(str(path), f"{place} {reason}")
                yield bad if reason else text_of(row, text_column, str(path), place)
        else:
            for place, found, reason in table_rows(text, form.delimiter, text_column):
                yield BadRow(str(path), f"{place} {reason}") if reason else found

    def groups(wanted: int) -> Iterator[Group]:
        with opened(path) as (raw, plain), _as_text(plain, form.encoding) as text:
            yield from _in_memory(documents(text), wanted, raw.tell)

    return Input(str(path), _stat(path).st_size, _fingerprint(form.kind, [path], text_column), groups)


def _in_memory(documents: Iterable[Document], wanted: int, tell: Callable[[], int]) -> Iterator[Group]:
    """Yield groups of documents; `tell` returns the bytes of the input that were read so far."""
    found: list[Document] = []
    size, before = 0, 0
    for document in documents:
        found.append(document)
        size += len(document.encode()) if isinstance(document, str) else 1
        if size >= wanted or len(found) == _MOST_ROWS:
            at = tell()
            yield Texts(found, at - before)
            found, size, before = [], 0, at
    if found:
        yield Texts(found, tell() - before)


def parquet(path: Path, text_column: str) -> Input:
    """Open a parquet file.

    Raises:
        DataError: a damaged file, or one whose column holds no text.
    """
    with open_parquet(path) as file:
        schema, counts = file.schema_arrow, range(file.num_row_groups)
        sizes = [file.metadata.row_group(number).total_byte_size for number in counts]
    kind = _column_type(schema, text_column)
    if kind is None:
        columns = [name for name, _ in _columns(schema)]
        raise DataError(
            str(path),
            f"has no column '{text_column}'; it has {', '.join(map(repr, columns)) or 'none'}: choose "
            "`text_column`",
        )
    value = getattr(kind, "value_type", None) if str(kind).startswith("dictionary<") else kind
    if str(value) not in ("string", "large_string", "string_view", "null"):
        raise DataError(str(path), f"the column '{text_column}' holds {kind}, no text: choose `text_column`")

    def groups(wanted: int) -> Iterator[Group]:
        return (RowGroup(path, number, text_column, size) for number, size in enumerate(sizes))

    return Input(str(path), sum(sizes), _fingerprint("parquet", [path], text_column), groups)


def _columns(schema: Any) -> Iterator[tuple[str, Any]]:
    """Yield name and type of the columns, and of those one level deeper: `a.b`."""
    for column in schema:
        yield column.name, column.type
        if str(column.type).startswith("struct<"):
            for inner in column.type:
                yield f"{column.name}.{inner.name}", inner.type


def _column_type(schema: Any, name: str) -> Any:
    return next((kind for column, kind in _columns(schema) if column == name), None)


def hub(spec: str, text_column: str) -> Input:
    """Open a data set of the Hugging Face hub: hf:NAME[:CONFIG][:SPLIT].

    Raises:
        UserError: the extra is not installed.
        DataError: no such data set or column, or a column that holds no text.
    """
    name, config, split = _hub_name(spec)
    try:
        import datasets
    except ImportError as error:
        raise UserError("inputs", missing_extra("datasets", "language", f"the input {spec}")) from error
    try:
        found = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # noqa: BLE001  of many packages' errors
        raise DataError(spec, f"cannot be loaded ({' '.join(str(error).split())[:200]})") from error
    if text_column not in found.column_names:
        raise DataError(
            spec,
            f"has no column '{text_column}'; it has {', '.join(map(repr, found.column_names))}: "
            "choose `text_column`",
        )
    kind = str(getattr(found.features[text_column], "dtype", "string"))
    if kind not in ("string", "large_string", "string_view", "null"):
        raise DataError(spec, f"the column '{text_column}' holds {kind}, no text: choose `text_column`")
    column_only = found.select_columns([text_column])

    def documents() -> Iterator[Document]:
        for number, row in enumerate(column_only, start=1):
            yield text_of(row, text_column, spec, f"row {number}")

    def groups(wanted: int) -> Iterator[Group]:
        texts: list[Document] = []
        size = 0
        for text in documents():
            texts.append(text)
            size += len(text.encode()) if isinstance(text, str) else 1
            if size >= wanted:
                yield Texts(texts, size)
                texts, size = [], 0
        if texts:
            yield Texts(texts, size)

    facts = [
        spec,
        text_column,
        len(found),
        str(found.features),
        str(found.info.version),
        str(found.info.dataset_size),
    ]
    return Input(
        spec,
        int(found.info.dataset_size or len(found)),
        hashlib.sha256(repr(facts).encode()).hexdigest(),
        groups,
    )


def _hub_name(spec: str) -> tuple[str, str | None, str]:
    """Return name, configuration and split (default: train) of hf:NAME[:CONFIG][:SPLIT]."""
    parts = spec.split(":")[1:]
    if len(parts) > 3 or not parts[0]:
        raise UserError(
            "inputs",
            f"{spec} is not of the form hf:NAME[:CONFIG][:SPLIT], for example "
            "hf:roneneldan/TinyStories or hf:wikitext::test",
        )
    name, config, split = [*parts, "", ""][:3]
    return name, config or None, split or "train"


def _fingerprint(kind: str, paths: Iterable[Path], *more: str) -> str:
    """Return a sha256 of the names, sizes and times of files."""
    digest = hashlib.sha256(repr((kind, *more)).encode())
    for path in paths:
        stat = _stat(path)
        digest.update(f"{path}\0{stat.st_size} {stat.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise DataError(str(path), f"cannot be read ({error.strerror}); repair or remove it") from error
