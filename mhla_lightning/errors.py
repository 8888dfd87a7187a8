"""Mistakes a user can make, told in one sentence. Imports nothing outside the standard library."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in the recipe, the command or the data. The command line prints the sentence and exits with 2, without a traceback."""


class DataError(UserError):
    """Shards, index or samples are not what they should be."""


def unknown_name(kind: str, name: object, valid: Iterable[str], of: str = "") -> str:
    """The sentence for a name that is not in a table: what was found (`of` what), what is allowed, and the nearest name."""
    names = sorted(valid)
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    place = f" of {of}" if of else ""
    return f"unknown {kind} '{name}'{place}; valid: {', '.join(names)}{hint}"


def missing_extra(package: str, extra: str, purpose: str) -> str:
    """The sentence for an optional package that is not installed."""
    return f"{purpose} needs the package '{package}': pip install 'mhla-lightning[{extra}]'"
