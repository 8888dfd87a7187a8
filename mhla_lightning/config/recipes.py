"""Recipe files and overrides. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mhla_lightning.config.moved_keys import moved, moved_name
from mhla_lightning.errors import UserError, unknown_name
from mhla_lightning.runs.folder import RunFolder, complete_checkpoints
from mhla_lightning.textfiles import read_text

_VARIANTS = "variants"
STUDIES = "studies"
"""Folder of the packaged studies, beside those of the recipes."""
RECIPES = Path(__file__).parent.parent / "recipes"


class _YamlLoader(yaml.SafeLoader):
    """A safe loader that reads 1e-4 as a number and refuses a key that is given twice.

    YAML 1.1 takes 1e-4 for text, and PyYAML keeps the last of two equal keys silently.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)  # as written; construction adds keys that `<<` merges
        keys = [key.value for key, _ in node.value]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(
                None, None, f"key '{twice}' is given twice", node.start_mark
            )
        return node


_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^(?:[-+]?(\d[\d_]*)?\.?\d+([eE][-+]?\d+)|[-+]?\d+\.\d*([eE][-+]?\d+)?"
        r"|[-+]?\.\d+|[-+]?\.(inf|Inf)|\.(nan|NaN))$"
    ),
    list("-+0123456789."),
)


@dataclass(frozen=True)
class Recipe:
    """A recipe as its file gives it.

    Args:
        name: `<task>/<name>` of a packaged recipe, else the file's name.
        path: the file.
        values: its content, with old keys in their new places.
    """

    name: str
    path: Path
    values: dict[str, Any]


def parse_yaml(text: str) -> Any:
    """Parse YAML without tags that run code; 1e-4 is a number."""
    return yaml.load(text, Loader=_YamlLoader)  # noqa: S506  (a SafeLoader)


def read_yaml(path: Path) -> Any:
    """Read a YAML file.

    Raises:
        UserError: the file cannot be read or is not YAML; the reason gives the line.
    """
    try:
        return parse_yaml(read_text(path))
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise UserError(str(path), f"the file is not YAML: {line}{error.problem}") from error
    except yaml.YAMLError as error:
        raise UserError(str(path), f"the file is not YAML: {' '.join(str(error).split())}") from error


def read_run_recipe(run: RunFolder, first: Path | None = None) -> dict[str, Any]:
    """Read the resolved recipe of a run; where its file is damaged, the copy in a checkpoint.

    Args:
        run: the run folder.
        first: another file of the same recipe, read before the others.

    Raises:
        UserError: the file is damaged, and no checkpoint holds a copy.
    """
    copies = [path / run.recipe.name for path in reversed(complete_checkpoints(run.path))]
    files = [path for path in (first, run.recipe, *copies) if path is not None and path.is_file()]
    whole = {path: text for path in files if (text := path.read_bytes()).endswith(b"\n") and _sections(path)}
    for path, text in whole.items():
        if not any(other != text and other.startswith(text) for other in whole.values()):
            return _sections(path)
    # A person may have edited the file, and left out the end of its last line.
    if values := _sections(run.recipe):
        return values
    read_yaml(run.recipe)  # raises with the line that is no YAML
    raise UserError(
        str(run.recipe), "the file is damaged, and no checkpoint holds a copy; write the recipe there again"
    )


def _sections(path: Path) -> dict[str, Any]:
    """The recipe in a file; empty where it lacks a section."""
    try:
        values = read_yaml(path)
    except UserError:
        return {}
    whole = isinstance(values, dict) and all(isinstance(values.get(name), dict) for name in ("model", "data"))
    return values if whole and "class_path" in values["model"] else {}


def recipe_names() -> list[str]:
    """Return the names of the packaged recipes, `<task>/<name>`."""
    return sorted(
        str(path.relative_to(RECIPES).with_suffix(""))
        for path in RECIPES.glob("*/*.yaml")
        if path.parent.name not in (_VARIANTS, STUDIES)
    )


def variants_file(name: str) -> Path:
    """Find the rows of a comparison, by path or by name (`recipes/variants/`).

    Raises:
        UserError: there is neither such a file nor such a name.
    """
    packaged = {path.stem: path for path in (RECIPES / _VARIANTS).glob("*.yaml")}
    path = Path(name)
    if path.is_file() or name not in packaged:
        if not path.is_file() and not name.endswith((".yaml", ".yml")):
            raise UserError("variants", unknown_name("variants (no such file either)", name, packaged))
        return path
    return packaged[name]


def load_recipe(name: str) -> Recipe:
    """Load a recipe by path or by its name in the package.

    Raises:
        UserError: no such recipe (the reason gives the nearest), or a file that is not a YAML mapping.
    """
    packaged = name.removesuffix(".yaml") in recipe_names()
    path = RECIPES / f"{name.removesuffix('.yaml')}.yaml" if packaged else Path(name)
    if path.is_dir():
        raise UserError("recipe", f"{name} is a folder; a recipe is a YAML file")
    if not path.is_file() and name.endswith((".yaml", ".yml")):
        raise UserError("recipe", f"the file {name} does not exist")
    if not path.is_file():
        raise UserError("recipe", unknown_name("recipe", name, recipe_names()))
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise UserError(
            str(path),
            f"the file holds {type(values).__name__}; a recipe is a mapping with trainer, model and data",
        )
    return Recipe(name.removesuffix(".yaml") if packaged else path.name, path, moved(values, told=True))


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """Read `--key value` and `--key=value` pairs, whose values are YAML.

    Raises:
        UserError: a word that is no pair.
    """
    overrides: dict[str, Any] = {}
    words = list(arguments)
    while words:
        word = words.pop(0)
        key, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not key:
            raise UserError(
                None,
                f"unexpected argument '{word}'; overrides are written --key value, for example "
                "--trainer.max_steps 100",
            )
        if not equals:
            if not words or words[0].startswith("--"):
                raise UserError(key, f"the option has no value; write --{key} VALUE")
            value = words.pop(0)
        try:
            overrides[key] = parse_yaml(value)
        except yaml.YAMLError as error:
            raise UserError(key, f"the value is not YAML: {value}") from error
    return overrides


def argument(values: Mapping[str, Any], key: str) -> Any:
    """Return the value of a dotted key of a recipe; None where the recipe gives none.

    Args:
        values: a recipe.
        key: dotted key, by its old or its new name, without `init_args`.
    """
    here: Any = values
    for part in moved_name(key, values).split("."):
        if isinstance(here, Mapping) and "class_path" in here:
            here = here.get("init_args")
        here = here.get(part) if isinstance(here, Mapping) else None
    return here


_OF_SOURCE = tuple(f"data.{key}" for key in ("source", "tokenizer", "frames", "size", "rate", "stride"))
"""Keys that describe how the recipe's own `data.path` is made."""


def apply_overrides(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a recipe with dotted keys set.

    `model.x` means `model.init_args.x`. Below a bare name of an attention or a strategy a key turns the name
    into a mapping. An override of `data.path` or `data.mix` removes `data.source` and the keys that belong to
    it: they describe the recipe's own data.

    Raises:
        UserError: a key below something that is no mapping.
    """
    result = moved(values)
    classes = _classes(result, overrides)
    overrides = {moved_name(key, classes, told=True): value for key, value in overrides.items()}
    others = {"data.path", "data.mix"} & overrides.keys() and "data.source" not in overrides
    if others and argument(result, "data.source") is not None:
        gone = [key for key in _OF_SOURCE if argument(result, key) is not None]
        overrides = {**{moved_name(key, classes): None for key in gone}, **overrides}
    for key, value in overrides.items():
        _set(result, key, deepcopy(value))
    return moved(result, told=True)


def _classes(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The class paths of a recipe once the overrides are applied, as a recipe without arguments."""
    found = {}
    for section in ("model", "data"):
        entry = overrides.get(section, values.get(section))
        path = entry.get("class_path") if isinstance(entry, Mapping) else None
        found[section] = {"class_path": overrides.get(f"{section}.class_path", path)}
    return found


def _set(recipe: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in place."""
    here: Any = recipe
    *parents, last = key.split(".")
    for depth, part in enumerate([*parents, None]):
        if not isinstance(here, dict):
            raise UserError(key, f"`{'.'.join(parents[:depth])}` is {here!r} and has no keys below it")
        if (
            "class_path" in here
            and part not in ("class_path", "init_args")
            and not (part is None and last in ("class_path", "init_args"))
        ):
            here = here.setdefault("init_args", {})
        if part is None:
            break
        if part in ("attention", "strategy") and isinstance(here.get(part), str):
            here[part] = {"name": here[part]}
        if here.get(part) is None:
            here[part] = {}
        here = here[part]
    here[last] = value
