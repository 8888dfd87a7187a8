"""Text files of users: prompts, captions, lists, recipes. Imports only the standard library.

Notepad and Excel begin a file with a byte order mark; every door of ours reads such files here.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mhla_lightning.errors import UserError

MARK = "\ufeff"
MOST_BYTES = 2**30
JSON_SUFFIXES = (".jsonl", ".ndjson", ".jl", ".json")
# UTF-32 comes first, since its mark begins with that of UTF-16.
_ENCODINGS = {
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
_NAMES = {"utf-8": "UTF-8", "utf-16-le": "UTF-16", "utf-16-be": "UTF-16"}
_ARRAY = re.compile(r"\s*\[\s*[{\]]")
_LINE_END = re.compile("\r\n|\r|\n")


class NotText(ValueError):
    """Bytes that are no text in the encoding that they should have."""


def encoding_of(head: bytes) -> tuple[str, int]:
    """Return the encoding of a file by its first bytes, and the length of the byte order mark.

    Without a mark it is UTF-8.
    """
    return next(
        ((name, len(mark)) for mark, name in _ENCODINGS.items() if head.startswith(mark)), ("utf-8", 0)
    )


def stream_encoding(encoding: str) -> str:
    """Return the codec that reads a stream in an encoding of encoding_of, and drops its mark."""
    return "utf-8-sig" if encoding == "utf-8" else encoding[: len("utf-16")]


def decode(data: bytes) -> str:
    """Decode the content of a file, without its byte order mark.

    Raises NotText, which names the line.
    """
    encoding, start = encoding_of(data)
    try:
        return data[start:].decode(encoding)
    except UnicodeDecodeError as error:
        before = data[start : start + error.start].decode(encoding, "ignore")
        found = " ".join(f"0x{byte:02X}" for byte in data[start + error.start : start + error.start + 1])
        name = _NAMES.get(encoding, "UTF-32")
        raise NotText(f"line {len(split_lines(before))} is no {name} text (byte {found})") from error


def split_lines(text: str) -> list[str]:
    """Return the lines of a text, without byte order marks that begin a line.

    Lines end as in files of Unix and Windows.
    Characters such as U+2028, at which str.splitlines cuts, may stand inside a JSON string.
    """
    return [line.removeprefix(MARK) for line in _LINE_END.split(text)]


def read_text(
    path: str | Path,
    key: str | None = None,
    most: int = MOST_BYTES,
    kind: type[UserError] = UserError,
) -> str:
    """Read a text file: UTF-8 with or without a byte order mark, or UTF-16 or UTF-32 with one.

    Args:
        path: of the file.
        key: of an error; None is the path.
        most: bytes that it may have.
        kind: of an error.

    Raises:
        UserError: a file that cannot be read or is no text, which names the line; of the class `kind`.
    """
    path = Path(path)
    subject = "" if key is None else f"{path} "
    key = str(path) if key is None else key
    try:
        size = path.stat().st_size
        if size > most:
            raise kind(key, f"{subject}has {size} bytes; at most {most} are read")
        text = decode(path.read_bytes())
    except OSError as error:
        raise kind(key, f"{subject}cannot be read ({error.strerror or error})") from error
    except NotText as error:
        raise kind(key, f"{subject or 'its '}{error}: save it as UTF-8") from error
    if "\0" in text:
        line = len(split_lines(text[: text.index("\0")]))
        reason = (
            f"{subject or 'its '}line {line} holds a NUL character, as UTF-16 without a byte order mark does"
        )
        raise kind(key, f"{reason}: save it as UTF-8")
    return text


def is_json(path: str | Path) -> bool:
    """Return whether a file is JSON by its name: lines of objects, or one array of them."""
    return Path(path).suffix.lower() in JSON_SUFFIXES


def json_rows(text: str) -> Iterator[tuple[str, Any]]:
    """Yield the place and the value of every row of JSON lines, or of one JSON array of objects.

    Raises NotText for a row that is no JSON.
    """
    if _ARRAY.match(text):
        yield from ((f"item {number}", row) for number, row in enumerate(_json(text, "it"), start=1))
        return
    for number, line in enumerate(split_lines(text), start=1):
        if line.strip():
            yield f"line {number}", _json(line, f"line {number}")


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise NotText(f"{place} is no JSON ({error})") from error
