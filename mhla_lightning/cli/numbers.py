"""Lists and counts of numbers on the command line, which may not be of any length."""

from __future__ import annotations

import argparse
import re

from mhla_lightning.errors import UserError
from mhla_lightning.runs.folder import shortened

_RANGE = re.compile(r"([0-9]+)(?:-([0-9]+))?")
_DIGITS = 9


def parse_ranges(key: str, text: str, what: str, most: int) -> list[int]:
    """Parse `0-2,7` to [0, 1, 2, 7].

    Args:
        key: the argument that holds the text.
        text: numbers and ranges, separated by commas.
        what: the numbers are, such as `classes`.
        most: numbers in all.

    Raises:
        UserError: another form, a range from high to low, or too many numbers; `key` is the error's.
    """
    shown = shortened(text, 80)
    ranges: list[range] = []
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        if match is None:
            raise UserError(
                key,
                f"'{shortened(part)}' in {shown} is no number and no range; write for example 0,1,2 or 0-2",
            )
        first, last = match[1], match[2] or match[1]
        if max(len(first), len(last)) > _DIGITS:
            raise UserError(
                key, f"'{shown}' is too much: at most {most:,} {what}, each below {10**_DIGITS:,}"
            )
        if int(last) < int(first):
            raise UserError(key, f"'{part}' in {shown} must go from low to high")
        ranges.append(range(int(first), int(last) + 1))
    count = sum(map(len, ranges))
    if count > most:
        raise UserError(key, f"'{shown}' is too much: {count:,} {what}; at most {most:,} are allowed")
    return [number for numbers in ranges for number in numbers]


def demand_at_most(args: argparse.Namespace, **most: int) -> None:
    """Raise UserError for an argument above its greatest value; None passes."""
    for name, value in most.items():
        given = getattr(args, name)
        if given is not None and given > value:
            raise UserError(name, f"{shortened(str(given))} is too large; it must be at most {value:,}")
