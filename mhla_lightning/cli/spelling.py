"""How the command line writes the keys of errors: `blocks` as `--model.attention.blocks`."""

from __future__ import annotations

import argparse
import re
from typing import Any

from mhla_lightning.errors import UserError

RECIPE_SECTIONS = ("seed_everything", "trainer", "model", "data", "checkpoint", "health")


class VerbParser(argparse.ArgumentParser):
    """A parser that knows how its arguments are written: argparse keeps that to itself."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self._written: dict[str, str] = {}
        self._verbs: Any = None
        super().__init__(*args, **options)

    def add_argument(self, *args: Any, **options: Any) -> argparse.Action:
        action = super().add_argument(*args, **options)
        if action.option_strings:
            self._written[action.dest] = action.option_strings[-1]
        elif isinstance(action.metavar, str):
            self._written[action.dest] = action.metavar
        return action

    def add_subparsers(self, **options: Any) -> Any:
        self._verbs = super().add_subparsers(**options)
        return self._verbs

    def add_argument_group(self, *args: Any, **options: Any) -> Any:
        """Return a group whose options are remembered too."""
        group = super().add_argument_group(*args, **options)
        add = group.add_argument

        def remember(*names: Any, **settings: Any) -> argparse.Action:
            action = add(*names, **settings)
            self._written.setdefault(action.dest, action.option_strings[-1])
            return action

        group.add_argument = remember  # type: ignore[method-assign]
        return group

    def written(self) -> dict[str, str]:
        """Every argument's name in Python -> as it is typed, arguments of sub-verbs included."""
        below = self._verbs.choices.values() if self._verbs is not None else ()
        return {name: text for parser in below for name, text in parser.written().items()} | self._written


def spelled(error: UserError, parser: VerbParser | None = None, takes_overrides: bool = False) -> str:
    """An error as the command line prints it.

    Args:
        error: of the library.
        parser: of the verb that was called; None before a verb is known.
        takes_overrides: whether the verb takes recipe keys as `--dotted.key`.
    """
    names = parser.written() if parser is not None else {}

    def spell(key: str) -> str:
        first, dot, rest = key.partition(".")
        if first in names:
            return f"{names[first]}{dot}{rest}"
        return f"--{key}" if takes_overrides and first in RECIPE_SECTIONS else key

    reason = re.sub(r"`([a-z_][\w.]*)`", lambda match: spell(match[1]), error.reason)
    return f"{spell(error.key)}: {reason}" if error.key else reason
