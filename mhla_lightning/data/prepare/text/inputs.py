"""The inputs of text that a user names, and what each of their files is taken for.

They are files, folders, the Hugging Face hub and Python's standard library.
"""

from __future__ import annotations

import sysconfig
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from mhla_lightning.data.prepare.text.formats import (
    Format,
    is_companion,
    recognise,
)
from mhla_lightning.data.prepare.text.readers import Input, hub, json_lines, parquet, rows, text_files
from mhla_lightning.data.prepare.walking import files_below
from mhla_lightning.errors import DataError, UserError

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
            found.append(text_files(spec, files))
            taken["plain text"] += len(files)
        elif spec.startswith("hf:"):
            found.append(hub(spec, text_column))
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
        return [text_files(str(paths[0]), paths)]
    if kind == "parquet":
        return [parquet(path, text_column) for path in paths]
    if kind == "JSON lines":
        return [json_lines(member.path, member.format.encoding, text_column) for member in members]
    return [rows(member.path, member.format, text_column) for member in members]


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
