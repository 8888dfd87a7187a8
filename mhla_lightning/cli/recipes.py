"""List the recipes that come with the package, or show one.

The purpose of a recipe is the first comment line of its file. The paper's number is a sentence of the comment
at the head of the file, such as `Paper: 75.8 % top-1 (Table 2).`
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
from pathlib import Path

from mhla_lightning.config.recipes import RECIPES, load_recipe, recipe_names
from mhla_lightning.errors import UserError, unknown_name

_ARXIV = re.compile(r"\barxiv:?\s*\d{4}\.\d{4,5}(v\d+)?", re.IGNORECASE)
_VALUE = re.compile(r"\d+\.\d|\d\s?%")
_LABEL = re.compile(r"^paper(?:'s number)?:\s*", re.IGNORECASE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verbs of `mhla recipes` to its parser."""
    verbs = parser.add_subparsers(dest="recipes_verb", required=True, metavar="VERB")
    listing = verbs.add_parser(
        "list", help="one line a recipe", description="List the recipes that come with the package."
    )
    listing.add_argument("--task", metavar="NAME", help="only recipes of this task: classification, language")
    listing.add_argument("--json", metavar="FILE", help="also write the table as JSON")
    show = verbs.add_parser(
        "show", help="print the file of a recipe", description="Print the file of a recipe."
    )
    show.add_argument("name", metavar="NAME", help="name of a packaged recipe, or path of a YAML file")


def run(args: argparse.Namespace) -> int:
    """List the recipes or show one; return the exit code."""
    return _show(args.name) if args.recipes_verb == "show" else _list(args.task, args.json)


def _list(task: str | None, json_file: str | None) -> int:
    rows = [
        {"recipe": name, **header_facts((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))}
        for name in _names(task)
    ]
    _print_table(rows)
    if json_file is not None:
        Path(json_file).write_text(
            json.dumps({"rows": rows}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
    return 0


def _names(task: str | None) -> list[str]:
    names = recipe_names()
    tasks = {name.partition("/")[0] for name in names}
    if task is not None and task not in tasks:
        raise UserError("task", unknown_name("task", task, tasks))
    return [name for name in names if task is None or name.startswith(f"{task}/")]


def _print_table(rows: list[dict[str, str | None]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("recipe", "purpose", "paper", caption="mhla recipes show NAME; mhla run NAME")
    table.columns[0].no_wrap = True
    for row in rows:
        table.add_row(*(Text(value or "-") for value in row.values()))
    Console(width=None if sys.stdout.isatty() else 240).print(table)


def _show(name: str) -> int:
    text = load_recipe(name).path.read_text(encoding="utf-8")
    if not sys.stdout.isatty():
        sys.stdout.write(text)
        return 0
    from rich.console import Console
    from rich.syntax import Syntax

    colored = Syntax("", "yaml", theme="ansi_dark", background_color="default").highlight(text)
    Console().print(colored, soft_wrap=True, end="")
    return 0


def header_facts(text: str) -> dict[str, str | None]:
    """Read the comment above a recipe's first key.

    Returns:
        purpose: the first comment line; None where there is none.
        paper: the number of the paper that the recipe aims at; None where it names none.
    """
    head = itertools.takewhile(lambda line: line.startswith("#") or not line.strip(), text.splitlines())
    lines = [line.lstrip("#").strip() for line in head if line.startswith("#")]
    lines = [line for line in lines if line]
    return {"purpose": lines[0] if lines else None, "paper": paper_number(" ".join(lines))}


def paper_number(header: str) -> str | None:
    """Return the first sentence about the paper that begins with `Paper:` or holds a number.

    A number is a decimal or a percentage. A semicolon ends a sentence, too.
    """
    for sentence in re.split(r"(?<=[.;])\s+", header):
        words = sentence.strip().rstrip(".;")
        if not re.search(r"\bpaper\b", words, re.IGNORECASE) or re.search(
            r"\bnot an?\b", words, re.IGNORECASE
        ):
            continue
        if _LABEL.match(words) or _VALUE.search(_ARXIV.sub("", words)):
            return _LABEL.sub("", words)
    return None
