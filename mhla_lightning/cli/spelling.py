"""The command line's spelling of the keys in errors: `blocks` is `--model.attention.blocks`."""

from __future__ import annotations

import argparse
import re
from typing import Any

from mhla_lightning.errors import DataError, UserError

RECIPE_SECTIONS = ("imports", "seed_everything", "trainer", "model", "data", "checkpoint", "health")


class VerbParser(argparse.ArgumentParser):
    """A parser that remembers how its arguments are typed, which argparse does not offer."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self._written: dict[str, str] = {}
        self._verbs: Any = None
        super().__init__(*args, **options)

    def add_argument(self, *args: Any, **options: Any) -> argparse.Action:
        return self._note(super().add_argument(*args, **options))

    def add_mutually_exclusive_group(self, **options: Any) -> Any:
        """Return a group whose arguments are noted too; of two options, the first gives the name."""
        group = super().add_mutually_exclusive_group(**options)
        add = group.add_argument
        group.add_argument = lambda *args, **options: self._note(add(*args, **options))  # type: ignore[method-assign]
        return group

    def _note(self, action: argparse.Action) -> argparse.Action:
        if action.option_strings:
            self._written.setdefault(action.dest, action.option_strings[-1])
        elif isinstance(action.metavar, str):
            self._written.setdefault(action.dest, action.metavar)
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

    @property
    def sub_verbs(self) -> dict[str, VerbParser]:
        """The parsers of the verbs below this one, such as `pack` of `data`."""
        return dict(self._verbs.choices) if self._verbs is not None else {}

    def written(self) -> dict[str, str]:
        """Return every argument's name in Python -> as it is typed, also those of sub-verbs."""
        return {
            name: text for parser in self.sub_verbs.values() for name, text in parser.written().items()
        } | self._written


def spelled(error: UserError, parser: VerbParser | None = None, takes_overrides: bool = False) -> str:
    """Return an error as the command line prints it.

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
    if not error.key:
        return reason
    # `model.safetensors` is a file, no key of a recipe; some DataErrors blame an argument, such as `val`
    is_place = error.key not in names and (isinstance(error, DataError) or "/" in error.key)
    return f"{error.key if is_place else spell(error.key)}: {reason}"
