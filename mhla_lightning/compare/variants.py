"""The rows of a comparison: their overrides, names and run ids.

Imports no torch.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mhla_lightning.config.recipes import parse_yaml, read_yaml
from mhla_lightning.errors import UserError

_SLUG_LENGTH = 60
_ATTENTION = ("model.attention", "model.init_args.attention")
_PATHS = ("data.path", "data.source", "data.init_args.path", "data.init_args.source")


@dataclass(frozen=True)
class VariantRow:
    """One line of the table.

    Args:
        name: shown in table and plot; unique.
        slug: begins the run ids of the row; unique even where the file system ignores case.
        overrides: dotted key -> value, this row's own.
    """

    name: str
    slug: str
    overrides: dict[str, Any]

    def run_id(self, seed: int) -> str:
        return f"{self.slug}-seed{seed}"


def rows_over(given: Sequence[str], attention: Any = None) -> list[VariantRow]:
    """Rows of `--over KEY=YAML-LIST` options; several multiply, the first changes slowest.

    The bare name of the operator that the recipe has, under `model.attention`, is the recipe's own entry.

    Args:
        given: the options.
        attention: entry of the recipe.

    Raises:
        UserError: an option of another form, a key or a value given twice.
    """
    axes: dict[str, list[Any]] = {}
    for text in given:
        key, values = _axis(text)
        if key in axes:
            raise UserError("over", f"{key} is given twice; write all its values in one list")
        axes[key] = values
    combinations = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    return _rows(
        (
            ", ".join(describe(key, value) for key, value in overrides.items()),
            {key: _as_in_the_recipe(key, value, attention) for key, value in overrides.items()},
        )
        for overrides in combinations
    )


def _as_in_the_recipe(key: str, value: Any, attention: Any) -> Any:
    """Return the recipe's attention entry for its bare name, else the value."""
    if key in _ATTENTION and isinstance(attention, Mapping) and attention.get("name") == value:
        return dict(attention)
    return value


def _axis(text: str) -> tuple[str, list[Any]]:
    key, equals, values = text.removeprefix("--").partition("=")
    if not key or not equals:
        raise UserError(
            "over", f"'{text}' is not KEY=YAML-LIST; write for example 'model.attention=[linear, mhla]'"
        )
    try:
        found = parse_yaml(values)
    except yaml.YAMLError as error:
        raise UserError("over", f"the list of {key} is no YAML: {values}") from error
    if not isinstance(found, list) or not found:
        raise UserError(
            "over",
            f"{key} needs a YAML list with at least one value, not {values or 'nothing'}; "
            f"write '{key}=[A, B]'",
        )
    for index, value in enumerate(found):
        if value in found[:index] and _as_json(value) in map(
            _as_json, found[:index]
        ):  # 1 == True, as JSON they differ
            raise UserError("over", f"{key} lists {describe(key, value)} twice")
    return key, found


def rows_from_file(path: Path) -> list[VariantRow]:
    """Return the rows of a variants file.

    The file is a YAML mapping from row name to dotted overrides; empty overrides are the recipe
    unchanged.

    Raises:
        UserError: no such file, no YAML, another form, a name given twice.
    """
    table = read_yaml(path)
    if not isinstance(table, dict) or not table:
        raise UserError(
            str(path),
            "the file is no mapping from row names to dotted overrides; write for example "
            "'small lr: {model.optimizer.lr: 1e-4}'",
        )
    return read_rows(table, str(path))


def read_rows(table: Mapping[Any, Any], key: str) -> list[VariantRow]:
    """Return the rows of a mapping from row name to dotted overrides.

    Args:
        table: the mapping; None is no override.
        key: of the error.

    Raises:
        UserError: another form.
    """
    for name, overrides in table.items():
        if not isinstance(overrides, dict | None):
            raise UserError(
                key,
                f"row '{name}' is {overrides!r}, not a mapping of dotted overrides such as "
                "{model.attention: linear}",
            )
    return _rows(
        (str(name), {str(key): value for key, value in (overrides or {}).items()})
        for name, overrides in table.items()
    )


def _rows(named: Iterable[tuple[str, dict[str, Any]]]) -> list[VariantRow]:
    """Makes names and slugs unique by a number."""
    rows: list[VariantRow] = []
    for name, overrides in named:
        unique = _unused(name, [row.name for row in rows], " ({})")
        rows.append(VariantRow(unique, _unused(slug(unique), [row.slug for row in rows], "-{}"), overrides))
    return rows


def _unused(name: str, taken: Sequence[str], suffix: str) -> str:
    lower = [other.lower() for other in taken]
    candidates = itertools.chain([name], (name + suffix.format(n) for n in itertools.count(2)))
    return next(candidate for candidate in candidates if candidate.lower() not in lower)


def describe(key: str, value: Any) -> str:
    """Return a value in a few readable words: `mhla mix_init=uniform`.

    A bare number or switch gets the last word of its key: `lr=0.001`.
    """
    if isinstance(value, str) and value:
        return value
    if isinstance(value, Mapping) and value:
        return words(value)
    return f"{key.rpartition('.')[2]}={_word(value)}"


def words(value: Mapping[str, Any]) -> str:
    """Return a mapping as its name (or class) and its options."""
    rest = dict(value)
    head = [str(rest.pop("name"))] if "name" in rest else []
    if "class_path" in rest:
        head.append(str(rest.pop("class_path")).rpartition(".")[2])
        rest |= rest.pop("init_args", None) or {}
    return " ".join([*head, *(f"{key}={_word(item)}" for key, item in rest.items())])


def _word(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"({words(value)})"
    if isinstance(value, list):
        return f"[{', '.join(_word(item) for item in value)}]"
    return value if isinstance(value, str) and value else _as_json(value)


def slug(name: str) -> str:
    """A row's name as the beginning of a run id: letters, digits, '.', '_' and '-'."""
    words = re.sub(r"[^A-Za-z0-9._]+|\.{2,}", "-", name)[:_SLUG_LENGTH]
    return words.strip("-._") or "row"


def seed_list(text: str) -> list[int]:
    """`0,1,2` as numbers.

    Raises:
        UserError: anything else, or a seed given twice.
    """
    words = text.replace(" ", "").split(",")
    if not all(re.fullmatch(r"\d{1,9}", word) for word in words):
        raise UserError("seeds", f"'{text}' is no list of whole numbers; write for example 0,1,2")
    seeds = [int(word) for word in words]
    if len(set(seeds)) < len(seeds):
        raise UserError("seeds", f"'{text}' names a seed twice")
    return seeds


def merged(common: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row's overrides over those of all rows.

    A key comes after the keys above it: `model.attention`, then `model.attention.mix_init`.
    """
    return dict(sorted({**common, **own}.items(), key=lambda item: item[0].count(".")))


def arguments(overrides: Mapping[str, Any]) -> list[str]:
    """Return overrides as words of a command line.

    JSON is YAML, and keeps text that looks like a number text.
    """
    return [f"--{key}={_as_json(value)}" for key, value in overrides.items()]


def identity(
    recipe: Mapping[str, Any], rows: Sequence[VariantRow], seeds: Sequence[int], common: Mapping[str, Any]
) -> str:
    """Eight hex digits: the same for the same comparison, wherever its data lies."""
    data = recipe.get("data")
    init_args = data.get("init_args") if isinstance(data, Mapping) else None
    content = dict(recipe)
    if isinstance(data, Mapping) and isinstance(init_args, Mapping):
        content["data"] = {
            **data,
            "init_args": {key: value for key, value in init_args.items() if key not in ("path", "source")},
        }
    kept = {key: value for key, value in common.items() if key not in _PATHS}
    table = [[row.name, row.overrides] for row in rows]
    return hashlib.sha256(_as_json([content, table, list(seeds), kept], sort_keys=True).encode()).hexdigest()[
        :8
    ]


def _as_json(value: Any, *, sort_keys: bool = False) -> str:
    return json.dumps(value, default=str, sort_keys=sort_keys, ensure_ascii=False)
