"""List the recipes that come with the package, or show one.

  mhla recipes list --cpu
  mhla recipes show classification/deit_tiny_mhla_mnist_cpu

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
_WIDTH = 100  # characters of a table that no terminal shows
_LABEL = re.compile(r"^paper(?:'s number)?:\s*", re.IGNORECASE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verbs of `mhla recipes` to its parser."""
    verbs = parser.add_subparsers(dest="recipes_verb", required=True, metavar="VERB")
    listing = verbs.add_parser(
        "list",
        help="one line a recipe",
        description="List the recipes that come with the package.",
        epilog="Example: mhla recipes list wan --task video_dit",
    )
    listing.add_argument("words", metavar="WORD", nargs="*", help="only recipes that hold these words")
    listing.add_argument("--task", metavar="NAME", help="only recipes of this task: classification, language")
    listing.add_argument("--cpu", action="store_true", help="only recipes that train on a CPU in minutes")
    listing.add_argument("--json", metavar="FILE", help="also write the table as JSON")
    show = verbs.add_parser(
        "show",
        help="print the file of a recipe",
        description="Print the file of a recipe.",
        epilog="Example: mhla recipes show classification/deit_tiny_mhla_mnist_cpu",
    )
    show.add_argument("name", metavar="NAME", help="name of a packaged recipe, or path of a YAML file")


def run(args: argparse.Namespace) -> int:
    """List the recipes or show one; return the exit code."""
    if args.recipes_verb == "show":
        return _show(args.name)
    return _list(args.words, args.task, args.cpu, args.json)


def _list(words: list[str], task: str | None, cpu: bool, json_file: str | None) -> int:
    rows = [
        {"recipe": name, **header_facts((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))}
        for name in _names(task)
        if name.endswith("_cpu") or not cpu
    ]
    rows = [
        row for row in rows if all(word.lower() in " ".join(map(str, row.values())).lower() for word in words)
    ]
    if not rows:
        asked = [*map(repr, words), *([f"--task {task}"] if task else []), *(["--cpu"] if cpu else [])]
        raise UserError(None, f"no recipe fits {' '.join(asked)}; `mhla recipes list` shows all")
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
    """Print a block a recipe: its name on a line, then what it is for and the paper's number."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("recipe", box=None, show_header=False, padding=(0, 0, 1, 0))
    for row in rows:
        block = Text(str(row["recipe"]), style="bold")
        block.append(Text(f"\n{row['purpose'] or '-'}", style="not bold"))
        if re.search(r"\d", row["paper"] or ""):
            block.append(Text(f"\npaper: {row['paper']}", style="not bold dim"))
        table.add_row(block)
    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    console.print(table, "mhla recipes show NAME prints one; lightning run NAME trains it", highlight=False)


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
