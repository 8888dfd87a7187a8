"""Mistakes of users: a key and a reason. Imports nothing outside the standard library."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A mistake in a recipe, a command, an argument or the data.

    The library names the key as Python spells it (`blocks`, `optimizer.lr`) and gives the reason.
    Each door writes the key in its own spelling: the command line prints `--model.attention.blocks`
    (cli/spelling.py) and exits with code 2, without a traceback. In a reason, other keys stand in
    backticks (`overwrite`), so that a door can spell them too.

    Args:
        key: dotted name of the argument or recipe key; the file, folder or address where the mistake is
            in one; None where no single thing is to blame.
        reason: what was found and what is allowed, in plain words, without the key.
    """

    def __init__(self, key: str | None, reason: str | None = None) -> None:
        if reason is None:  # TODO(house): until every call names its key
            key, reason = None, str(key)
        super().__init__(key, reason)
        self.key, self.reason = key, reason

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}" if self.key else self.reason


class DataError(UserError):
    """Shards, an index or samples are damaged or missing; the key is the file, folder or address."""


@contextmanager
def inside(section: str) -> Iterator[None]:
    """Prefixes the keys of errors raised in the block: `blocks` becomes `attention.blocks`.

    Errors about files (:class:`DataError`) and errors without a key pass unchanged.
    """
    try:
        yield
    except DataError:
        raise
    except UserError as error:
        if error.key is not None:
            error.key = f"{section}.{error.key}"
        raise


def unknown_name(kind: str, name: object, valid: Iterable[str], of: str = "") -> str:
    """The reason for a name that is not in a table: what was found (`of` what), what is allowed, and the
    nearest name.
    """
    names = sorted(valid)
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    place = f" of {of}" if of else ""
    return f"unknown {kind} '{name}'{place}; valid: {', '.join(names)}{hint}"


def missing_extra(package: str, extra: str, purpose: str) -> str:
    """The reason for an optional package that is not installed."""
    return f"{purpose} needs the package '{package}': pip install 'mhla-lightning[{extra}]'"
