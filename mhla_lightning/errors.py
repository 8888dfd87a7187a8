"""Mistakes of users: a key and a reason. Imports only the standard library."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

_SHOWN = 10  # names of a table in an error
_NEAREST = 3  # of them, as suggestions
_NEAR = 0.5  # likeness of a suggestion, of 1


class UserError(Exception):
    """A mistake in a recipe, a command, an argument or the data.

    The library names the key as Python spells it (`blocks`, `optimizer.lr`) and gives the reason.
    Each door writes the key in its own spelling: the command line prints `--model.attention.blocks`
    (cli/spelling.py) and exits with code 2, without a traceback. In a reason, other keys are written in
    backticks (`overwrite`), so that a door can spell them, too.

    Args:
        key: dotted name of the argument or recipe key; or the file, folder or address that is wrong; None
            where no single thing is.
        reason: the value that was found and the values that are allowed, in plain words, without the key.
    """

    def __init__(self, key: str | None, reason: str) -> None:
        super().__init__(key, reason)
        self.key, self.reason = key, reason

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}" if self.key else self.reason


class DataError(UserError):
    """Damaged or missing shards, index or samples; the key is a file, folder or address."""


class DiskError(UserError):
    """A full or failing disk: once it has room, the same command goes on; the exit code is 75."""


@contextmanager
def inside(section: str) -> Iterator[None]:
    """Prefixes the keys of errors raised in the block: `blocks` becomes `attention.blocks`.

    Errors about files (:class:`DataError`, or a key with a slash) and errors without a key pass unchanged.
    """
    try:
        yield
    except DataError:
        raise
    except UserError as error:
        if error.key is not None and "/" not in error.key:
            error.key = below(section, error.key)
            error.args = (error.key, error.reason)  # another process rebuilds the error from them
        raise


def below(section: str, key: str) -> str:
    """Return a key in its place below a section; parts that both have are written once.

    >>> below("model.optimizer", "optimizer.lr")
    'model.optimizer.lr'

    Args:
        section: dotted place of the argument that was built.
        key: dotted key of the error that building it raised.
    """
    outer, inner = section.split("."), key.split(".")
    shared = next((n for n in range(len(inner), 0, -1) if outer[-n:] == inner[:n]), 0)
    return ".".join([*outer, *inner[shared:]])


def unknown_name(kind: str, name: object, valid: Iterable[str], of: str = "") -> str:
    """Return the reason for an unknown name: the nearest names first, then at most ten.

    >>> unknown_name("operator", "mlha", ["softmax", "mhla"])
    "unknown operator 'mlha'; did you mean 'mhla'? valid: mhla, softmax"

    Args:
        kind: of the name: `backbone`, `key`.
        name: that was found.
        valid: the names in the table.
        of: the owner of the name, such as `profile x`; empty where it has none.
    """
    likeness = {candidate: _likeness(str(name), candidate) for candidate in sorted(valid)}
    ranked = sorted(likeness, key=lambda candidate: -likeness[candidate])
    holding = [candidate for candidate in ranked[:_NEAREST] if likeness[candidate] > 1]
    near = holding or [candidate for candidate in ranked[:1] if likeness[candidate] >= _NEAR]
    *first, last = [f"'{candidate}'" for candidate in near] or [""]
    hint = f" did you mean {' or '.join([', '.join(first), last] if first else [last])}?" if near else ""
    shown = ", ".join(sorted(ranked[:_SHOWN]))
    more = f" and {len(ranked) - _SHOWN} more" if len(ranked) > _SHOWN else ""
    place = f" of {of}" if of else ""
    return f"unknown {kind} '{name}'{place};{hint} valid: {shown}{more}"


def _likeness(text: str, candidate: str) -> float:
    """Return 0 to 1, and above 1 where the candidate, `folder/name` or `name`, holds the text."""
    last = candidate.rpartition("/")[2]
    ratio = max(difflib.SequenceMatcher(None, text, part).ratio() for part in (candidate, last))
    return ratio + (len(text) > 1 and text in candidate)


def missing_extra(package: str, extra: str, purpose: str) -> str:
    """Return the reason for an optional package that is not installed.

    Args:
        package: its name in Python.
        extra: the extra of mhla-lightning that installs it.
        purpose: the feature that needs it, a subject: `decoding video`.
    """
    return f"{purpose} needs the package '{package}': pip install 'mhla-lightning[{extra}]'"
