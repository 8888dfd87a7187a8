"""Length and wording of lines, docstrings and sentences."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping

from tests.house.source import Finding, nodes, package_files, package_trees, text_of, tracked

LINE = 110
HEADING = 90  # characters of a docstring's first line
WORDS = 25  # of a sentence
BANNED = re.compile(
    r"\bis one sentence\b|gone on from|goes on from|what that has no|is told in one|stands for itself"
    r"|so that many|\bthe sentence for\b|that what\b|\bwhoever\b",
    re.IGNORECASE,
)


def long_lines() -> list[Finding]:
    """Return the lines of Python over the length."""
    return [
        Finding(path, number, f"{len(line)} characters")
        for path in tracked()
        for number, line in enumerate(text_of(path).splitlines(), 1)
        if len(line) > LINE
    ]


def line_count() -> int:
    """Return the lines of all Python files."""
    return sum(len(text_of(path).splitlines()) for path in tracked())


Trees = Mapping[str, ast.Module]


def docstrings(trees: Trees | None = None) -> Iterator[tuple[str, int, str]]:
    """Yield path, line and text of every docstring."""
    for path, tree in (package_trees() if trees is None else trees).items():
        for node in nodes(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = ast.get_docstring(node)
                if text:
                    yield path, getattr(node, "lineno", 1), text


def headings(trees: Trees | None = None) -> list[Finding]:
    """Return the docstrings whose first line is too long, or runs on into the second."""
    found = []
    for path, line, text in docstrings(trees):
        first, *rest = text.splitlines()
        if len(first) > HEADING or (rest and rest[0].strip()):
            found.append(Finding(path, line, first[:70]))
    return found


def long_sentences(trees: Trees | None = None) -> list[Finding]:
    """Return the sentences of docstrings with more than 25 words.

    Commands and drawings, which are indented in a module's docstring, are no sentences. Entries of Args,
    Returns and Raises are lists: a semicolon ends an item.
    """
    found = []
    for path, line, text in docstrings(trees):
        if line == 1:
            text = re.sub(r"(?m)^  .*$", "", text)
        for paragraph in re.split(r"\n\s*\n|\n(?=\s*[\w`*., ]{1,40}: )", text):
            if ">>>" in paragraph or "|" in paragraph:
                continue
            entry = paragraph.startswith((" ", "Args:", "Returns:", "Raises:"))
            ends = ".?!;" if entry else ".?!"
            for sentence in re.split(rf"(?<=[{ends}])\s+", " ".join(paragraph.split())):
                if len(sentence.split()) > WORDS:
                    found.append(Finding(path, line, sentence[:90]))
    return found


def banned_phrases() -> list[Finding]:
    """Return the phrases that a newcomer must decode, in code, recipes and guides."""
    paths = [*package_files(), *tracked("*.md"), *tracked("*.yaml")]
    return [
        Finding(path, number, line.strip()[:90])
        for path in paths
        for number, line in enumerate(text_of(path).splitlines(), 1)
        if BANNED.search(line)
    ]


def readme_lines() -> int:
    """Return the lines of the README."""
    return len(text_of("README.md").splitlines())
