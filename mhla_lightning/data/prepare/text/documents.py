"""Groups of documents, small enough to be handed to a worker process and read there."""

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
    """Some documents in a fixed order. Picklable. size: the bytes of input that they are, for the
    progress.
    """

    @property
    def size(self) -> int: ...

    def texts(self) -> Iterator[str | None]:
        """The documents, None for a file that is no text. Raises DataError, one sentence with file and
        line.
        """


@dataclass(frozen=True)
class Files:
    """Whole files, each a document in UTF-8."""

    paths: list[Path]
    size: int

    def texts(self) -> Iterator[str | None]:
        """The content of every file, with its line ends as they are."""
        for path in self.paths:
            try:
                yield path.read_bytes().decode("utf-8")
            except UnicodeDecodeError:
                yield None
            except OSError as error:
                raise DataError(f"{path} cannot be read ({error.strerror}): repair or remove it") from error


@dataclass(frozen=True)
class Lines:
    """Lines of JSON: objects whose key `column` holds a document. first: number of the first line in its
    file, from 1 on.
    """

    path: Path
    first: int
    lines: list[bytes]
    column: str
    size: int

    def texts(self) -> Iterator[str]:
        """A document a line; empty lines are none."""
        for number, line in enumerate(self.lines, start=self.first):
            if line.strip():
                yield self._text(f"{self.path} line {number}", line)

    def _text(self, where: str, line: bytes) -> str:
        try:
            content: Any = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where} is no JSON ({error})") from error
        if not isinstance(content, dict):
            raise DataError(
                f"{where} is a JSON {type(content).__name__}; an object with the key '{self.column}' "
                "is needed"
            )
        if self.column not in content:
            raise DataError(
                f"{where} has no key '{self.column}'; it has "
                f"{', '.join(map(repr, content)) or 'none'}: see --text-column"
            )
        text = content[self.column]
        if not isinstance(text, str):
            raise DataError(
                f"{where}: the key '{self.column}' holds a JSON {type(text).__name__}, no text: see "
                "--text-column"
            )
        return _LONE_SURROGATES.sub(
            "\N{REPLACEMENT CHARACTER}", text
        )  # JSON can spell half a character, UTF-8 cannot


@dataclass(frozen=True)
class RowGroup:
    """One row group of a parquet file, of which one column is read."""

    path: Path
    number: int
    column: str
    size: int

    def texts(self) -> Iterator[str]:
        """A document a row; missing values are empty ones."""
        with open_parquet(self.path) as file:
            try:
                for batch in file.iter_batches(
                    batch_size=1024, row_groups=[self.number], columns=[self.column]
                ):
                    for text in batch.column(0).to_pylist():
                        yield text or ""
            except (OSError, ValueError) as error:  # pyarrow's own errors are one of the two
                raise DataError(
                    f"{self.path}, row group {self.number}, cannot be read ({_line(error)}): copy it again"
                ) from error


@dataclass(frozen=True)
class Texts:
    """Documents as they are."""

    found: list[str]
    size: int

    def texts(self) -> Iterator[str]:
        """The documents."""
        yield from self.found


def open_parquet(path: Path) -> Any:
    """A pyarrow.parquet.ParquetFile. Raises UserError when pyarrow is not installed, DataError for a file
    that is none.
    """
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(missing_extra("pyarrow", "language", f"reading {path}")) from error
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is no parquet file that can be read ({_line(error)})") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
