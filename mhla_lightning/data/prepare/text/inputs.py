"""Sources of text.

They are files, folders, JSON lines, parquet, the Hugging Face hub and Python's standard library.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import IO, Any

from mhla_lightning.data.prepare.text.documents import Files, Group, Lines, RowGroup, Texts, open_parquet
from mhla_lightning.data.prepare.walking import files_below
from mhla_lightning.errors import DataError, UserError, missing_extra

LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
PARQUET = (".parquet",)
_MOST_FILES = 2**12  # in a group
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


def open_inputs(inputs: Sequence[str], text_column: str = "text") -> list[Input]:
    """Open the inputs that a user names.

    Args:
        inputs: files, folders, text:FOLDER, stdlib or hf:NAME[:CONFIG][:SPLIT].
        text_column: of JSON lines, parquet and hf.

    Raises:
        UserError: an input that does not exist.
        DataError: a column that does not exist, or an input without files.
    """
    if not inputs:
        raise UserError("inputs", "none is given; name files, folders, stdlib or hf:NAME")
    return [found for spec in inputs for found in _open(str(spec), text_column)]


def folder_of(spec: str) -> Path | None:
    """Return the folder that an input names; None when it names something else."""
    path = Path(spec.removeprefix("text:")).expanduser()
    return path if spec != "stdlib" and path.is_dir() else None


def _open(spec: str, text_column: str) -> list[Input]:
    if spec == "stdlib":
        return [_text_files(spec, _standard_library())]
    if spec.startswith("hf:"):
        return [_hub(spec, text_column)]
    path = Path(spec.removeprefix("text:")).expanduser()
    if path.is_dir():
        files = files_below(path)
        if not files:
            raise DataError(spec, "holds no files")
        grouped = groupby(files, _type)
        return [found for kind, members in grouped for found in _files(kind, list(members), text_column)]
    if path.is_file():
        return _files(_type(path), [path], text_column)
    raise UserError(
        "inputs",
        f"{spec} does not exist; name a file, a folder, stdlib, text:FOLDER or hf:NAME[:CONFIG][:SPLIT]",
    )


def _type(path: Path) -> str:
    name = path.name.lower()
    return "lines" if name.endswith(LINES) else "parquet" if name.endswith(PARQUET) else "text"


def _files(kind: str, paths: list[Path], text_column: str) -> list[Input]:
    if kind == "text":
        return [_text_files(str(paths[0]), paths)]
    return [
        _json_lines(path, text_column) if kind == "lines" else _parquet(path, text_column) for path in paths
    ]


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


def _json_lines(path: Path, text_column: str) -> Input:
    def groups(wanted: int) -> Iterator[Group]:
        lines: list[bytes] = []
        first, size, before = 1, 0, 0
        with _opened(path) as (raw, plain):
            for line in _readable(path, plain):
                lines.append(line)
                size += len(line)
                if size >= wanted:
                    at = raw.tell()
                    yield Lines(path, first, lines, text_column, at - before)
                    first, lines, size, before = first + len(lines), [], 0, at
            if lines:
                yield Lines(path, first, lines, text_column, raw.tell() - before)

    if path.name.lower().endswith(".zst"):
        _zstandard(path)  # a missing package is reported now, not in the middle
    return Input(str(path), _stat(path).st_size, _fingerprint("lines", [path], text_column), groups)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[IO[bytes], Iterable[bytes]]]:
    """Give the block a file as it is on the disk, and its lines."""
    try:
        raw = open(path, "rb")  # noqa: SIM115  closed below
    except OSError as error:
        raise DataError(str(path), f"cannot be read ({error.strerror})") from error
    name = path.name.lower()
    with raw:
        if name.endswith(".gz"):
            with gzip.open(raw) as plain:
                yield raw, plain
        elif name.endswith(".zst"):
            with _zstandard(path).ZstdDecompressor().stream_reader(raw, read_across_frames=True) as stream:
                yield raw, io.BufferedReader(stream, 2**20)
        else:
            yield raw, iter(raw.readline, b"")  # iterating over a file forbids tell()


def _readable(path: Path, lines: Iterable[bytes]) -> Iterator[bytes]:
    errors: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error)
    if path.name.lower().endswith(".zst"):
        errors += (_zstandard(path).ZstdError,)
    try:
        yield from lines
    except errors as error:
        raise DataError(
            str(path), f"cannot be read to its end ({error}); it was cut or damaged, so copy it again"
        ) from error


def _zstandard(path: Path) -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise UserError(str(path), missing_extra("zstandard", "language", "reading it")) from error
    return zstandard


def _parquet(path: Path, text_column: str) -> Input:
    with open_parquet(path) as file:
        schema, counts = file.schema_arrow, range(file.num_row_groups)
        sizes = [file.metadata.row_group(number).total_byte_size for number in counts]
    if text_column not in schema.names:
        raise DataError(
            str(path),
            f"has no column '{text_column}'; it has "
            f"{', '.join(map(repr, schema.names)) or 'none'}: choose `text_column`",
        )
    kind = str(schema.field(text_column).type)
    if kind not in ("string", "large_string", "string_view"):
        raise DataError(str(path), f"the column '{text_column}' holds {kind}, no text: choose `text_column`")

    def groups(wanted: int) -> Iterator[Group]:
        return (RowGroup(path, number, text_column, size) for number, size in enumerate(sizes))

    return Input(str(path), sum(sizes), _fingerprint("parquet", [path], text_column), groups)


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
    column_only = found.select_columns([text_column])

    def groups(wanted: int) -> Iterator[Group]:
        texts: list[str] = []
        size = 0
        for row in column_only:
            if not isinstance(row[text_column], str | None):
                raise DataError(
                    spec,
                    f"the column '{text_column}' holds {type(row[text_column]).__name__}, no text: choose "
                    "`text_column`",
                )
            texts.append(row[text_column] or "")
            size += len(texts[-1].encode())
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
