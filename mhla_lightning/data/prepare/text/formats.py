"""What a file of text is, by its content: plain text, JSON lines, JSON, CSV, TSV or parquet.

Its name decides only where the content leaves a choice: JSON named .txt is text unless it has the wanted key.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from mhla_lightning.data.prepare.text.compression import (
    HEAD_BYTES,
    SUFFIXES,
    compression_of,
    opened,
    zstandard,
)
from mhla_lightning.data.prepare.text.documents import JSON, lookup, names
from mhla_lightning.errors import DataError
from mhla_lightning.textfiles import JSON_SUFFIXES, MARK, encoding_of

Kind = Literal["plain text", "JSON lines", "JSON", "CSV", "TSV", "parquet"]
LINE_SUFFIXES = (".jsonl", ".ndjson", ".jl")
TABLES: dict[str, Kind] = {".csv": "CSV", ".tsv": "TSV"}
_DELIMITERS = {"CSV": ",;\t", "TSV": "\t"}
_LOOKED_AT, _LONGEST_ROW = 2**16, 2**26  # bytes of the content; of a first row that is longer
_FIRST_LINES = 5
# Packed files whose content may look like text, or that deserve a better word than binary.
_ARCHIVES = {
    b"PK\x03\x04": "a zip archive; unpack it",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive; unpack it",
    b"\x04\x22\x4d\x18": "compressed by lz4; decompress it",
    b"ARROW1\0\0": "an Arrow file; save it as parquet",
}
_TAR = slice(257, 262)
_COMPANION = re.compile(
    r"(readme|license|licence|citation|manifest|checksums?|(md5|sha256)sums?)(\.\w+)?"
    r"|dataset_infos?\.json|dataset_dict\.json|state\.json|_success|.*\.(md5|sha256)"
)


@dataclass(frozen=True)
class Format:
    """What a file holds.

    Args:
        kind: of its content.
        encoding: of its text, such as utf-8.
        delimiter: between the fields of CSV and TSV.
        keys: the keys or columns of its first row, for a message.
        has_column: whether the first rows have the wanted key.
        one_document: whether a file without the key may be text all the same: one object, or a table.
        unreadable: why the file is left out; empty for one that is read.
    """

    kind: Kind
    encoding: str = "utf-8"
    delimiter: str = ","
    keys: str = ""
    has_column: bool = True
    one_document: bool = False
    unreadable: str = ""


def is_companion(path: Path) -> bool:
    """Return whether a file beside data describes them: README.md, dataset_infos.json, ..."""
    return _COMPANION.fullmatch(path.name.lower()) is not None


def recognise(path: Path, column: str) -> Format:
    """Say what a file holds, by its first bytes.

    Args:
        path: of the file.
        column: key or column of the text.

    Raises:
        UserError: a package for it is not installed.
        DataError: a file that cannot be opened, or is not compressed as its name says.
    """
    inner, outer = _suffixes(path)
    with opened(path) as found:
        head = found.plain.read(HEAD_BYTES)
        if inner == ".parquet" or head.startswith(b"PAR1"):
            return Format("parquet")
        _check_name(path, inner, outer)
        archive = next((what for mark, what in _ARCHIVES.items() if head.startswith(mark)), "")
        if archive or head[_TAR] == b"ustar":
            return Format("plain text", unreadable=archive or "a tar archive; unpack it")
        encoding, skipped = encoding_of(head)
        if inner in TABLES:
            return _table(TABLES[inner], _more(found.plain, head, _LOOKED_AT)[skipped:], encoding, column)
        begins = head[skipped:].decode(encoding, "replace").lstrip()[:1]
        if begins not in ("{", "[") and inner not in LINE_SUFFIXES:
            return Format("plain text", encoding)
        return _json(found.plain, head, inner, column)


def _suffixes(path: Path) -> tuple[str, str]:
    """Return the suffix of the content and that of the compression, in small letters."""
    name = path.name.lower()
    outer = next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")
    return Path(name.removesuffix(outer)).suffix, outer


def _check_name(path: Path, inner: str, outer: str) -> None:
    """Refuse JSON, CSV or parquet that is not compressed as its name says."""
    if outer not in SUFFIXES or inner not in (*JSON_SUFFIXES, *TABLES):
        return
    if outer == ".zst":
        zstandard(path)
    with open(path, "rb") as file:
        head = file.read(HEAD_BYTES)
    if head and compression_of(head) is None:
        raise DataError(
            str(path), f"is no {SUFFIXES[outer]} file, whatever its name says; rename it or copy it again"
        )


def _more(stream: IO[bytes], head: bytes, wanted: int) -> bytes:
    """Return `head` and what follows it, in all about the wanted bytes."""
    while len(head) < wanted and (data := stream.read(wanted - len(head))):
        head += data
    return head


def _json(stream: IO[bytes], head: bytes, inner: str, column: str) -> Format:
    encoding, skipped = encoding_of(head)
    wanted = _LOOKED_AT
    while True:
        head = _more(stream, head, wanted)
        whole = len(head) < wanted
        text = head[skipped:].decode(encoding, "replace").lstrip(f"{MARK} \t\r\n")
        kind, rows = _rows(text, whole)
        if rows or whole or wanted >= _LONGEST_ROW:
            break
        wanted *= 8
    if inner in LINE_SUFFIXES:
        return Format(kind if rows else "JSON lines", encoding)
    has_column = any(_has_text(row, column) for row in rows)
    if inner == ".json" and not rows and _is_array(text):
        return Format(kind, encoding, keys="no objects", has_column=False)
    if not has_column and (inner != ".json" or not rows):
        return Format("plain text", encoding)
    one = not text.startswith("[") and len(rows) == 1
    return Format(kind, encoding, keys=names(rows[0]), has_column=has_column, one_document=one)


def _rows(text: str, whole: bool) -> tuple[Kind, list[Mapping[str, Any]]]:
    """Return what JSON at the begin of a text is, and the first rows of it that were found."""
    if text.startswith("["):
        return "JSON", _first_value(text[1:].lstrip())
    lines = text.split("\n")
    complete = [line for line in (lines if whole else lines[:-1])[:_FIRST_LINES] if line.strip()]
    rows = [row for line in complete for row in _first_value(line.strip(), alone=True)]
    return ("JSON lines", rows) if rows else ("JSON", _first_value(text))


def _is_array(text: str) -> bool:
    """Return whether a text begins as an array of JSON, of anything but objects."""
    inside = text[1:].lstrip()
    try:
        return text.startswith("[") and (inside.startswith("]") or bool(JSON.raw_decode(inside)))
    except (ValueError, RecursionError):
        return False


def _first_value(text: str, alone: bool = False) -> list[Mapping[str, Any]]:
    """Return the object that a text begins with, or nothing; `alone`: the text is nothing else."""
    try:
        value, end = JSON.raw_decode(text)
    except (ValueError, RecursionError):
        return []
    return [value] if isinstance(value, Mapping) and not (alone and end < len(text)) else []


def _has_text(row: Mapping[str, Any], column: str) -> bool:
    try:
        return isinstance(lookup(row, column), str | None)
    except KeyError:
        return False


def _table(kind: Kind, head: bytes, encoding: str, column: str) -> Format:
    text = head.decode(encoding, "replace")
    headers = {
        delimiter: next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), [])
        for delimiter in _DELIMITERS[kind]
    }
    found = next((mark for mark, header in headers.items() if column in header), _DELIMITERS[kind][0])
    header = headers[found]
    return Format(
        kind,
        encoding,
        found,
        ", ".join(map(repr, header)) or "none",
        column in header or not text.strip(),
        one_document=True,
    )


def json_values(text: IO[str]) -> Iterator[tuple[str, Any, str]]:
    """Yield the rows of JSON arrays, or JSON objects that follow each other over several lines.

    Bytes that are no UTF-8 are expected as the error handler surrogateescape leaves them.

    Yields:
        place, value and the reason why the row cannot be read, empty where it can.
    """
    buffer, at, number, ended, in_array = "", 0, 0, False, False
    step = 2**20
    while True:
        at = _gap(buffer, at, in_array)
        if at == 0 and not in_array and buffer.startswith("["):
            in_array = True
            continue
        if at < len(buffer):
            try:
                value, stop = JSON.raw_decode(buffer, at)
            except RecursionError as error:
                reason, broken = str(error), at
            except ValueError as error:
                broken = getattr(error, "pos", at)
                reason = str(error)
                if not ended and (reason.startswith("Unterminated string") or broken >= len(buffer) - 16):
                    reason = ""  # more text may complete the value
            else:
                number += 1
                damaged = _UNDECODED.search(buffer, at, stop)
                yield f"item {number}", value, "is no UTF-8" if damaged else ""
                at = stop
                continue
            if reason:
                number += 1
                yield f"item {number}", None, f"is no JSON ({reason})"
                following = _NEXT_ROW.search(buffer, broken)
                at = following.end() - 1 if following else len(buffer)
                continue
        if ended:
            return
        data = text.read(max(step, len(buffer) - at))
        ended = not data
        buffer, at = buffer[at:] + data, 0
        if not in_array and number == 0:
            buffer = buffer.lstrip(f"{MARK} \t\r\n")


_UNDECODED = re.compile("[\udc80-\udcff]")  # by the error handler surrogateescape
_NEXT_ROW = re.compile(r"\n\s*\{")
_GAP, _ARRAY_GAP = re.compile(rf"[\s{MARK}]*"), re.compile(rf"[\s,\[\]{MARK}]*")


def _gap(buffer: str, at: int, in_array: bool) -> int:
    found = (_ARRAY_GAP if in_array else _GAP).match(buffer, at)
    assert found is not None
    return found.end()


def table_rows(text: IO[str], delimiter: str, column: str) -> Iterator[tuple[str, str, str]]:
    """Yield the rows of a table whose first line names its columns.

    Yields:
        place, text and the reason why the row cannot be read, empty where it can.
    """
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(text, delimiter=delimiter)
    header = next(reader, [])
    if column not in header:  # an empty file
        return
    wanted = header.index(column)
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield f"line {reader.line_num}", "", f"cannot be read ({error})"
            continue
        if row and len(row) != len(header):
            yield f"line {reader.line_num}", "", f"has {len(row)} fields, and the header {len(header)}"
        elif row:
            damaged = _UNDECODED.search(row[wanted])
            yield f"line {reader.line_num}", row[wanted], "is no UTF-8" if damaged else ""
