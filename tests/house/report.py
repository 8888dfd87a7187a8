"""Measure the layout, the names and the prose of the package (`make house`).

    python -m tests.house.report [--list NAME] [--path PREFIX]

The table has a row a measure; the command fails when a bound is exceeded. `--list` prints every finding of
the rows whose name contains a text, with file and line.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass

from tests.house import layers, names, prose
from tests.house.layers import LAYERS, PERMITTED
from tests.house.source import Finding

__all__ = ["LAYERS", "PERMITTED", "ROWS", "Finding", "Measure", "main"]


@dataclass(frozen=True)
class Measure:
    """One row of the table.

    Attributes:
        value: measured.
        bound: the largest value that is allowed.
        findings: the places that count, where there are any to show.
    """

    value: float
    bound: float
    findings: list[Finding]

    @property
    def holds(self) -> bool:
        """Whether the bound is kept."""
        return self.value <= self.bound


def _count(find: Callable[[], list[Finding]], bound: int = 0) -> Callable[[], Measure]:
    """A row that counts findings."""

    def measure() -> Measure:
        findings = find()
        return Measure(len(findings), bound, findings)

    return measure


def _rings() -> list[Finding]:
    return [Finding("", 0, " <-> ".join(ring)) for ring in layers.rings(layers.imports())]


def _parameters() -> Measure:
    most = max(int(f.text.split()[0]) for f in names.parameter_counts())
    return Measure(most, names.PARAMETERS, names.parameters())


def _long_lines() -> Measure:
    findings = prose.long_lines()
    return Measure(round(100 * len(findings) / prose.line_count(), 2), 1, findings)


ROWS: dict[str, Callable[[], Measure]] = {
    "rings of rooms, folders and modules": _count(_rings),
    "arrows that run up": _count(lambda: layers.upward(layers.imports())),
    "private names of other libraries": _count(names.private_uses, 19),
    "most parameters of a function": _parameters,
    "lines over 110 characters, %": _long_lines,
    "class names with two meanings": _count(names.homonyms),
    "protocols by strings": _count(names.by_string),
    "lines of the README": lambda: Measure(prose.readme_lines(), 150, []),
    "docstrings with a long first line": _count(prose.headings),
    "sentences over 25 words": _count(prose.long_sentences),
    "phrases to decode": _count(prose.banned_phrases),
}


def main() -> int:
    """Print the table; return 1 when a bound is exceeded."""
    parser = argparse.ArgumentParser(prog="python -m tests.house.report", description=__doc__)
    parser.add_argument("--list", metavar="NAME", help="print the findings of rows that contain this text")
    parser.add_argument("--path", default="", help="only findings in paths that begin with this")
    args = parser.parse_args()
    kept = True
    for name, measure in ROWS.items():
        if args.list is not None and args.list not in name:
            continue
        row = measure()
        kept &= row.holds
        if args.list is None:
            mark = "" if row.holds else "   <-- too many"
            print(f"{name:40} {row.value:>8g}   at most {row.bound:g}{mark}")
        else:
            print(*(str(f) for f in row.findings if f.path.startswith(args.path)), sep="\n")
    return int(not kept)


if __name__ == "__main__":
    sys.exit(main())
