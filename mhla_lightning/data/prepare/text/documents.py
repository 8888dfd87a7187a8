"""Groups of documents, small enough to be sent to a worker process and read there."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mhla_lightning.data.prepare.text.compression import HEAD_BYTES, compression_of, opened
from mhla_lightning.errors import DataError, UserError, missing_extra
from mhla_lightning.textfiles import MARK, NotText, decode

JUDGED_AFTER = 100  # rows
MAX_SKIPPED_SHARE = 0.01
_SURROGATES = re.compile("[\ud800-\udfff]")
# Integers become floats, which may have any number of digits; only texts are taken from a row.
JSON = json.JSONDecoder(parse_int=float)


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be read.

    Args:
        source: file or input of the row.
        reason: names the row and what is wrong.
    """

    source: str
    reason: str


@dataclass
class RowTally:
    """The rows that were read, and those that cannot be read.

    Args:
        rows: number of all.
        bad: number of those that cannot be read.
        first: of them.
    """

    rows: int = 0
    bad: int = 0
    first: BadRow | None = None

    def add(self, document: Document) -> None:
        """Count a document; a file that is no text is no row."""
        self.rows += document is not None
        if isinstance(document, BadRow):
            self.bad += 1
            self.first = self.first or document

    def demand_any(self) -> None:
        """Raise DataError when none of many rows can be read."""
        if self.first is not None and self.bad == self.rows >= JUDGED_AFTER:
            self._refuse(f"none of the first {self.rows} rows can be read")

    def judge(self, share: float) -> None:
        """Raise DataError when more than this share of the rows cannot be read, or no row can."""
        if self.first is not None and (self.bad > share * self.rows or self.bad == self.rows):
            found = f"{self.bad} of {self.rows} rows cannot be read"
            self._refuse(f"{found}, more than `max_skipped_share` {share:g} allows")

    def _refuse(self, found: str) -> None:
        assert self.first is not None
        raise DataError(self.first.source, f"{self.first.reason}; {found}")


Document = str | BadRow | None
"""A text, perhaps empty; a row that cannot be read; None for a file that is no text"""


def check_share(share: float) -> None:
    """Raise UserError for a share of rows that is none."""
    if not 0 <= share <= 1:
        raise UserError("max_skipped_share", f"got {share}; it must be from 0 to 1")


class Group(Protocol):
    """Some documents in a fixed order. Can be pickled.

    Its size in bytes of input serves the progress bar.
    """

    @property
    def size(self) -> int: ...

    def texts(self) -> Iterator[Document]:
        """Yield the documents. Raises DataError, with the file as its key."""


@dataclass(frozen=True)
class Files:
    """Whole files, each a document."""

    paths: list[Path]
    size: int

    def texts(self) -> Iterator[Document]:
        """Yield the content of every file, without a byte order mark; line ends stay as they are."""
        for path in self.paths:
            try:
                yield decode(_content(path))
            except NotText:
                yield None


def _content(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            head = file.read(HEAD_BYTES)
            if compression_of(head) is None:
                return head + file.read()
    except OSError as error:
        raise DataError(str(path), f"cannot be read ({error.strerror}); repair or remove it") from error
    with opened(path) as found:
        return found.plain.read()


@dataclass(frozen=True)
class Lines:
    """Lines of JSON: objects whose key `text_column` holds a document.

    Args:
        path: of the file.
        first: number of the first line in the file, from 1 on.
        lines: their content, UTF-8.
        text_column: key of the text.
        size: bytes of input.
    """

    path: Path
    first: int
    lines: list[bytes]
    text_column: str
    size: int

    def texts(self) -> Iterator[Document]:
        """Yield a document for each line that is not empty."""
        for number, line in enumerate(self.lines, start=self.first):
            if line.strip():
                yield self._text(f"line {number}", line)

    def _text(self, place: str, line: bytes) -> Document:
        try:
            row = JSON.decode(line.decode("utf-8", "surrogatepass").removeprefix(MARK))
        except (ValueError, RecursionError) as error:
            return BadRow(str(self.path), f"{place} is no JSON ({error})")
        return text_of(row, self.text_column, str(self.path), place)


@dataclass(frozen=True)
class RowGroup:
    """One row group of a parquet file, of which one column is read.

    Args:
        path: of the file.
        number: of the row group.
        text_column: column of the text.
        size: bytes of input.
    """

    path: Path
    number: int
    text_column: str
    size: int

    def texts(self) -> Iterator[Document]:
        """Yield a document for each row; a missing value is an empty document."""
        with open_parquet(self.path) as file:
            first = 1
            try:
                for batch in file.iter_batches(
                    batch_size=1024, row_groups=[self.number], columns=[self.text_column]
                ):
                    column = batch.column(0)
                    for name in self.text_column.split(".")[1:] if column.type.num_fields else ():
                        column = column.field(name)
                    yield from self._texts(column, first)
                    first += len(column)
            except (OSError, ValueError) as error:  # pyarrow's own errors are one of the two
                raise DataError(
                    str(self.path), f"row group {self.number} cannot be read ({_line(error)}); copy it again"
                ) from error

    def _texts(self, column: Any, first: int) -> list[Document]:
        try:
            return [text or "" for text in column.to_pylist()]
        except UnicodeDecodeError:  # of one value or more
            return [self._value(value, first + place) for place, value in enumerate(column)]

    def _value(self, value: Any, row: int) -> Document:
        try:
            return value.as_py() or ""
        except UnicodeDecodeError as error:
            place = f"row {row} of row group {self.number}"
            return BadRow(str(self.path), f"{place} is no UTF-8 ({error.reason} at byte {error.start})")


@dataclass(frozen=True)
class Texts:
    """Documents in memory."""

    found: list[Document]
    size: int

    def texts(self) -> Iterator[Document]:
        """Yield the documents."""
        yield from self.found


def lookup(row: Mapping[str, Any], column: str) -> Any:
    """Return the value under a key; `a.b` also means the key b inside a. Raises KeyError."""
    if column in row:
        return row[column]
    outer, _, inner = column.partition(".")
    found = row[outer]
    if not inner or not isinstance(found, Mapping):
        raise KeyError(column)
    return lookup(found, inner)


def text_of(row: Any, column: str, source: str, place: str) -> Document:
    """Return the text of a row of JSON; null is an empty document.

    Args:
        row: the parsed value.
        column: key of the text.
        source: file or input of the row.
        place: of the row in it, such as `line 3`.
    """
    if not isinstance(row, Mapping):
        return BadRow(
            source, f"{place} is a JSON {_json_type(row)}; an object with the key '{column}' is needed"
        )
    try:
        text = lookup(row, column)
    except KeyError:
        return BadRow(source, f"{place} has no key '{column}'; it has {names(row)}: choose `text_column`")
    if text is None:
        return ""
    if not isinstance(text, str):
        return BadRow(
            source,
            f"{place}: the key '{column}' holds a JSON {_json_type(text)}, no text: choose `text_column`",
        )
    # JSON can spell half a character, UTF-8 cannot.
    return _SURROGATES.sub("\N{REPLACEMENT CHARACTER}", text)


def names(row: Mapping[str, Any]) -> str:
    """Return the keys of a row for a message, with those one level deeper."""
    found = []
    for name, value in row.items():
        found.append(name)
        found += [f"{name}.{inner}" for inner in value] if isinstance(value, Mapping) else []
    return ", ".join(map(repr, found)) or "none"


def _json_type(value: Any) -> str:
    kinds = {bool: "bool", float: "number", list: "list", str: "string", dict: "object", type(None): "null"}
    return kinds.get(type(value), type(value).__name__)


def open_parquet(path: Path) -> Any:
    """Open a pyarrow.parquet.ParquetFile.

    Raises:
        UserError: pyarrow is not installed.
        DataError: the file is no parquet file.
    """
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(str(path), missing_extra("pyarrow", "language", "reading it")) from error
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise DataError(str(path), f"is no parquet file that can be read ({_line(error)})") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
