"""Commands and Python in the fenced blocks of README, docs and notebooks."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass

from tests.house.source import ROOT, tracked

PAGES = ["README.md", *tracked("docs/*.md")]
NOTEBOOKS = tracked("examples/notebooks/*.ipynb")


@dataclass(frozen=True)
class Command:
    """A line of a block without a language.

    Args:
        page: its file.
        words: of the command, without variables before it and without its comment.
        variables: set before it, as in `MHLA_KERNEL=torch lightning run RECIPE`.
    """

    page: str
    words: tuple[str, ...]
    variables: tuple[str, ...] = ()

    def __str__(self) -> str:
        return shlex.join(self.words)


@dataclass(frozen=True)
class Python:
    """A block of Python.

    Args:
        page: its file.
        code: its lines.
    """

    page: str
    code: str


def blocks(page: str) -> list[Command | Python]:
    """Return the commands and the Python blocks of a page, in their order."""
    found: list[Command | Python] = []
    for language, body in re.findall(r"(?ms)^```(\w*)\n(.*?)^```", _text(page)):
        if language == "python":
            found.append(Python(page, body))
        elif not language:
            found += commands(page, body)
    return found


def _text(page: str) -> str:
    """The Markdown of a page; of a notebook that of its cells."""
    text = (ROOT / page).read_text(encoding="utf-8")
    if not page.endswith(".ipynb"):
        return text
    cells = json.loads(text)["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def commands(page: str, body: str) -> list[Command]:
    """Return the commands of a block; a backslash joins lines, and a semicolon parts commands."""
    found = []
    for line in body.replace("\\\n", " ").splitlines():
        words: list[str] = []
        for word in [*shlex.split(line, comments=True), ";"]:
            alone, end = word.removesuffix(";"), word.endswith(";")
            words += [alone] if alone else []
            if end and words:
                count = next((n for n, one in enumerate(words) if not re.match(r"[A-Z_]+=", one)), 0)
                found.append(Command(page, tuple(words[count:]), tuple(words[:count])))
                words = []
    return found
