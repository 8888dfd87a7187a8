"""The page of all commands, from the parsers of `mhla_lightning.cli`."""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Iterator

from mhla_lightning.cli.main import VERBS, verb_parser


def page() -> str:
    """Return the page in Markdown: a section a verb."""
    parts = ["# Commands\n", "This page is made from the parsers. `mhla VERB --help` prints the same.\n"]
    for verb in VERBS:
        module, parser = verb_parser(verb)
        overrides = vars(module).get("TAKES_OVERRIDES", False)
        parts.append(f"## mhla {verb}\n")
        parts += _described(parser, overrides)
        for name, one in parser.sub_verbs.items():
            parts.append(f"### mhla {verb} {name}\n")
            parts += _described(one, overrides)
    return "\n".join(parts)


def _described(parser: argparse.ArgumentParser, overrides: bool) -> Iterator[str]:
    usage = " ".join(parser.format_usage().removeprefix("usage: ").split())
    keys = " [--dotted.key VALUE ...]"
    yield f"```\n{usage}{keys if overrides and keys not in usage else ''}\n```\n"
    yield prose(parser.description or "")
    rows = [_row(action) for action in parser._actions if not _is_hidden(action)]
    if rows:
        yield "| argument | default | meaning |\n|---|---|---|\n" + "\n".join(rows) + "\n"


def prose(text: str) -> str:
    """Return a module's docstring in Markdown: its indented lines are commands."""
    blocks = []
    for part in re.split(r"(?m)((?:^ +.*\n?)+)", text.strip()):
        blocks.append(f"```\n{textwrap.dedent(part).rstrip()}\n```" if part.startswith(" ") else part.strip())
    return "\n\n".join(block for block in blocks if block) + "\n"


def _is_hidden(action: argparse.Action) -> bool:
    kinds = (argparse._HelpAction, argparse._SubParsersAction)
    return isinstance(action, kinds) or action.help is argparse.SUPPRESS


def _row(action: argparse.Action) -> str:
    names = action.option_strings or [action.dest.upper()]
    value = "" if action.nargs == 0 or not action.option_strings else f" {_metavar(action)}"
    name = f"`{', '.join(names)}{value}`" if action.option_strings else f"`{_metavar(action)}`"
    default = action.default
    unset = default in (None, False, argparse.SUPPRESS, [], ()) or (default == 0 and action.nargs == 0)
    return f"| {name} | {'' if unset else f'`{default}`'} | {cell(_help(action))} |"


def _metavar(action: argparse.Action) -> str:
    if isinstance(action.metavar, str):
        return action.metavar
    if action.metavar is not None:
        return " ".join(action.metavar)
    return "{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.dest.upper()


def _help(action: argparse.Action) -> str:
    values = {key: value for key, value in vars(action).items() if value is not None}
    return (action.help or "") % (values | {"prog": "mhla"})


def cell(text: str) -> str:
    """Return a text for a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
