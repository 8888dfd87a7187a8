"""Sources of text.

They are files, folders, JSON lines, parquet, the Hugging Face hub and Python's standard library.
"""

from __future__ import annotations

import hashlib
import io
import os
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
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
    is_companion,
    json_values,
    recognise,
    table_rows,
)
from mhla_lightning.data.prepare.walking import files_below
from mhla_lightning.errors import DataError, UserError, missing_extra
from mhla_lightning.textfiles import stream_encoding

_MOST_FILES, _MOST_ROWS = 2**12, 2**16  # in a group
# Parts of the standard library that are left out: other packages, tests (half of them is data), and
# pydoc_data (one file with a twentieth of all text).
_LEFT_OUT = (
    "site-packages",
    "dist-packages",
    "__pycache__",
    "lib-dynload",
    "test",
    "tests",
    "idle_test",
    "pydoc_data",
)
# Files that differ from one machine to the next.
_OF_THE_MACHINE = ("_sysconfigdata", "sitecustomize", "usercustomize")


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


@dataclass(frozen=True)
class Inputs:
    """What a user's inputs hold.

    Args:
        sources: of the documents, in their order.
        taken: number of files by what they were taken for, such as JSON lines.
        left_out: (file, reason).
    """

    sources: list[Input]
    taken: dict[str, int]
    left_out: list[tuple[str, str]]


@dataclass(frozen=True)
class _Member:
    """A file of an input.

    Args:
        place: the folder whose files belong together.
        named: whether the user named the file itself.
        path: of the file.
        format: what it holds.
    """

    place: str
    named: bool
    path: Path
    format: Format

    @property
    def is_data(self) -> bool:
        """Whether the file has rows with the wanted key."""
        return self.format.kind != "plain text" and self.format.has_column

    @property
    def is_text(self) -> bool:
        """Whether the file is a document of its own."""
        form = self.format
        return form.kind == "plain text" and not form.unreadable and not is_companion(self.path)


def open_inputs(inputs: Sequence[str], text_column: str = "text") -> Inputs:
    """Open the inputs that a user names.

    Args:
        inputs: files, folders, text:FOLDER, stdlib or hf:NAME[:CONFIG][:SPLIT].
        text_column: of JSON, CSV, parquet and hf; `a.b` is the key b inside a.

    Raises:
        UserError: an input that does not exist.
        DataError: a column that does not exist, or an input without files.
    """
    if not inputs:
        raise UserError("inputs", "none is given; name files, folders, stdlib or hf:NAME")
    found: list[Input | list[_Member]] = []
    left_out: list[tuple[str, str]] = []
    taken: Counter[str] = Counter()
    for spec in map(str, inputs):
        if spec == "stdlib":
            files = _standard_library()
            found.append(_text_files(spec, files))
            taken["plain text"] += len(files)
        elif spec.startswith("hf:"):
            found.append(_hub(spec, text_column))
        else:
            members, hidden = _members(spec, text_column)
            found.append(members)
            left_out += [(str(path), "hidden") for path in hidden]
    members = [member for one in found if isinstance(one, list) for member in one]
    with_data = {member.place for member in members if member.is_data}
    with_text = {member.place for member in members if member.is_text}
    sources: list[Input] = []
    for one in found:
        if isinstance(one, Input):
            sources.append(one)
            continue
        kept = []
        for member in one:
            kind, reason = _judge(member, member.place in with_data, member.place in with_text, text_column)
            if reason:
                left_out.append((str(member.path), reason))
            else:
                kept.append((kind, member))
                taken[kind] += 1
        for kind, same in groupby(kept, key=lambda pair: pair[0]):
            sources += _sources(kind, [member for _, member in same], text_column)
    return Inputs(sources, dict(taken), left_out)


def folder_of(spec: str) -> Path | None:
    """Return the folder that an input names; None when it names something else."""
    path = Path(spec.removeprefix("text:")).expanduser()
    return path if spec != "stdlib" and path.is_dir() else None


def _members(spec: str, text_column: str) -> tuple[list[_Member], list[str]]:
    """Return the files of an input, and the names of those that are hidden."""
    path = Path(spec.removeprefix("text:")).expanduser()
    hidden: list[str] = []

    def shown(name: str) -> bool:
        if name.startswith("."):
            hidden.append(name)
        return not name.startswith(".")

    if path.is_dir():
        files = files_below(path, files=shown, folders=shown)
        if not files:
            raise DataError(spec, "holds no files")
        return [_Member(spec, False, file, recognise(file, text_column)) for file in files], hidden
    if path.is_file():
        return [_Member(str(path.parent), True, path, recognise(path, text_column))], []
    raise UserError(
        "inputs",
        f"{spec} does not exist; name a file, a folder, stdlib, text:FOLDER or hf:NAME[:CONFIG][:SPLIT]",
    )


def _judge(member: _Member, beside_data: bool, beside_text: bool, text_column: str) -> tuple[str, str]:
    """Return what a file is taken for, and why it is left out where it is.

    Raises DataError for a file that has rows, but not the column, and nothing to train on beside it.
    """
    form = member.format
    if form.unreadable:
        if member.named:
            raise DataError(str(member.path), f"is {form.unreadable}")
        return form.kind, form.unreadable
    if form.has_column:
        alone = form.kind != "plain text" or not (beside_data and is_companion(member.path))
        return form.kind, "" if alone else "it describes the data beside it"
    missing = f"has no key '{text_column}'; it has {form.keys}"
    if not beside_data and (member.named or not beside_text):
        raise DataError(
            str(member.path),
            f"is {form.kind} and {missing}: choose `text_column`, or give it a name in .txt to train on it "
            "as it is",
        )
    return ("plain text", "") if form.one_document and not beside_data else (form.kind, missing)


def _sources(kind: str, members: list[_Member], text_column: str) -> list[Input]:
    paths = [member.path for member in members]
    if kind == "plain text":
        return [_text_files(str(paths[0]), paths)]
    if kind == "parquet":
        return [_parquet(path, text_column) for path in paths]
    if kind == "JSON lines":
        return [_json_lines(member.path, member.format.encoding, text_column) for member in members]
    return [_rows(member.path, member.format, text_column) for member in members]


def _standard_library() -> list[Path]:
    def wanted(name: str) -> bool:
        return name not in _LEFT_OUT and not name.startswith((".", "config-", *_OF_THE_MACHINE))

    root = Path(sysconfig.get_paths()["stdlib"])
    files = files_below(root, lambda name: wanted(name) and name.endswith(".py"), wanted)
    if not files:
        raise DataError(
            str(root), "holds no sources of the standard library of this Python; name a folder of text"
        )
    return files


def _text_files(name: str, paths: list[Path]) -> Input:
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


def _json_lines(path: Path, encoding: str, text_column: str) -> Input:
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


def _rows(path: Path, form: Format, text_column: str) -> Input:
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


def _parquet(path: Path, text_column: str) -> Input:
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


def _hub(spec: str, text_column: str) -> Input:
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
