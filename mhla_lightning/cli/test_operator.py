"""Check an attention operator against the contract that models rely on, and print a table.

OPERATOR is a registered name, a class (my_package.operators.Power), or a Python file, which may name a class
(my_operators.py:Power). The code of that class or file is imported, and so runs.
  mhla test-operator mhla
  mhla test-operator my_operators.py --options '{power: 3}'
The exit code is 1 where a rule is broken. A rule that the operator refuses, or that does not apply, is none.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import yaml

from mhla_lightning.cli.output import check_json, write_json
from mhla_lightning.config.recipes import parse_yaml
from mhla_lightning.errors import UserError

if TYPE_CHECKING:
    from mhla_lightning.attention import Attention
    from mhla_lightning.attention.contract import RuleResult, Subject

_STYLES = {"holds": "green", "not checked": "dim", "refused": "yellow", "broken": "bold red"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mhla test-operator`."""
    parser.add_argument("operator", metavar="OPERATOR", help="name, dotted class, or file.py, file.py:CLASS")
    parser.add_argument(
        "--options",
        metavar="YAML",
        help="the operator's own keys, as a mapping (default: the class attribute `example`)",
    )
    parser.add_argument(
        "--kind",
        choices=("bidirectional", "causal"),
        help="of a name that both registries have (default: both)",
    )
    parser.add_argument(
        "--import",
        dest="modules",
        action="append",
        default=[],
        metavar="MODULE",
        help="import this first: it registers the operator; may be given several times",
    )
    parser.add_argument(
        "--dtype", choices=("float64", "float32"), default="float64", help="of the inputs (default: float64)"
    )
    parser.add_argument("--device", default="cpu", help="of the inputs (default: cpu)")
    parser.add_argument("--json", metavar="FILE", help="write the table as JSON too")


def run(args: argparse.Namespace) -> int:
    """Run the verb and return the exit code."""
    check_json(args.json)
    options = _options(args.options)
    import torch

    from mhla_lightning.attention.contract import Subject, check_contract
    from mhla_lightning.attention.contract.finding import find_operators
    from mhla_lightning.plugins import load_plugins

    load_plugins({"imports": args.modules})
    kinds = find_operators(args.operator, args.kind)
    rows: list[dict[str, Any]] = []
    for kind in kinds:
        chosen = kind.example if options is None else options
        subject = Subject(kind, chosen, getattr(torch, args.dtype), args.device)
        _check_building(subject)
        verdicts = list(check_contract(subject))
        _print_table(kind, chosen, verdicts)
        rows += [{"operator": _name(kind), **asdict(one)} for one in verdicts]
    write_json(args.json, {"rows": rows})
    broken = [row for row in rows if row["result"] == "broken"]
    for row in broken:
        print(f"error: {row['operator']} breaks '{row['check']}': {row['detail']}", file=sys.stderr)
    unusable = {row["operator"] for row in rows} - {
        row["operator"] for row in rows if row["result"] == "holds"
    }
    for name in unusable:
        print(f"error: {name}: no check could run; give its options with --options", file=sys.stderr)
    return int(bool(broken or unusable))


def _check_building(subject: Subject) -> None:
    """Refuse a constructor that does not take what models give it, before any check.

    An operator's own refusals are for the checks to show.
    """
    try:
        with suppress(UserError):
            subject.build()
    except TypeError as error:
        raise UserError(
            "operator",
            f"{_name(subject.kind)} cannot be built: {error}; its constructor takes heads, dim_k, "
            "dim_v and grid as keywords, and options from --options or the class attribute `example`",
        ) from error


def _options(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        found = parse_yaml(text)
    except yaml.YAMLError as error:
        raise UserError("options", f"the value is not YAML: {text}") from error
    if not isinstance(found, dict):
        raise UserError("options", f"{text} is no mapping; write it as '{{power: 3}}'")
    return found


def _name(kind: type[Attention]) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _print_table(kind: type[Attention], options: Any, verdicts: list[RuleResult]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    title = f"{_name(kind)} ({'causal' if kind.causal else 'bidirectional'}, {dict(options)})"
    table = Table("check", "result", "", title=Text(title), title_justify="left")
    for one in verdicts:
        table.add_row(one.check, Text(one.result, style=_STYLES[one.result]), Text(one.detail))
    Console(width=None if sys.stdout.isatty() else 160).print(table)
