"""Groups of documents, small enough to be sent to a worker process and read there."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mhla_lightning.errors import DataError, UserError, missing_extra

_LONE_SURROGATES = re.compile("[\ud800-\udfff]")


class Group(Protocol):
    """Some documents in a fixed order. Can be pickled.

    Its size in bytes of input serves the progress bar.
    """

    @property
    def size(self) -> int: ...

    def texts(self) -> Iterator[str | None]:
        """Yield the documents, and None for a file that is no text.

        Raises DataError, with the file as its key.
        """


@dataclass(frozen=True)
class Files:
    """Whole files, each a document in UTF-8."""

    paths: list[Path]
    size: int

    def texts(self) -> Iterator[str | None]:
        """Yield the content of every file, with its line ends as they are."""
        for path in self.paths:
            try:
                yield path.read_bytes().decode("utf-8")
            except UnicodeDecodeError:
                yield None
            except OSError as error:
                raise DataError(
                    str(path), f"cannot be read ({error.strerror}); repair or remove it"
                ) from error


@dataclass(frozen=True)
class Lines:
    """Lines of JSON: objects whose key `text_column` holds a document.

    Args:
        path: of the file.
        first: number of the first line in the file, from 1 on.
        lines: their content.
        text_column: key of the text.
        size: bytes of input.
    """

    path: Path
    first: int
    lines: list[bytes]
    text_column: str
    size: int

    def texts(self) -> Iterator[str]:
        """Yield a document for each line that is not empty."""
        for number, line in enumerate(self.lines, start=self.first):
            if line.strip():
                yield self._text(number, line)

    def _text(self, number: int, line: bytes) -> str:
        try:
            content: Any = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(str(self.path), f"line {number} is no JSON ({error})") from error
        if not isinstance(content, dict):
            raise DataError(
                str(self.path),
                f"line {number} is a JSON {type(content).__name__}; an object with the key "
                f"'{self.text_column}' is needed",
            )
        if self.text_column not in content:
            raise DataError(
                str(self.path),
                f"line {number} has no key '{self.text_column}'; it has "
                f"{', '.join(map(repr, content)) or 'none'}: choose `text_column`",
            )
        text = content[self.text_column]
        if not isinstance(text, str):
            raise DataError(
                str(self.path),
                f"line {number}: the key '{self.text_column}' holds a JSON {type(text).__name__}, no "
                "text: choose `text_column`",
            )
        # JSON can spell half a character, UTF-8 cannot.
        return _LONE_SURROGATES.sub("\N{REPLACEMENT CHARACTER}", text)


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

    def texts(self) -> Iterator[str]:
        """Yield a document for each row; a missing value is an empty document."""
        with open_parquet(self.path) as file:
            try:
                for batch in file.iter_batches(
                    batch_size=1024, row_groups=[self.number], columns=[self.text_column]
                ):
                    for text in batch.column(0).to_pylist():
                        yield text or ""
            except (OSError, ValueError) as error:  # pyarrow's own errors are one of the two
                raise DataError(
                    str(self.path), f"row group {self.number} cannot be read ({_line(error)}); copy it again"
                ) from error


@dataclass(frozen=True)
class Texts:
    """Documents in memory."""

    found: list[str]
    size: int

    def texts(self) -> Iterator[str]:
        """Yield the documents."""
        yield from self.found


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
