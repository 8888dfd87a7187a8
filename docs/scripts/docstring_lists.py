"""Entries of docstrings that name several arguments, as mkdocstrings reads them: one a line."""

from __future__ import annotations

import re
from typing import Any

import griffe


class DocstringLists(griffe.Extension):
    """Write `seed, order: ...` of a docstring as two entries."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of an object that was read."""
        if obj.docstring is not None:
            obj.docstring.value = split_entries(obj.docstring.value)


def split_entries(text: str) -> str:
    """Return a docstring whose entries have one name each."""

    def entries(match: re.Match[str]) -> str:
        names = [name.strip() for name in match[2].split(",")]
        return "\n".join(f"{match[1]}{name}: {match[3]}" for name in names)

    return re.sub(r"(?m)^( +)(\*{0,2}\w+(?:, \*{0,2}\w+)+): (.*)$", entries, text)
