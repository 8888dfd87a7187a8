"""Recipe files and overrides. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mhla_lightning.errors import UserError, unknown_name

_VARIANTS = "variants"
RECIPES = Path(__file__).parent.parent / "recipes"


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-4 as text, where people mean a number; and PyYAML takes the last of two equal keys
    without a word.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(
                None, None, f"key '{twice}' stands twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^(?:[-+]?(\d[\d_]*)?\.?\d+([eE][-+]?\d+)|[-+]?\d+\.\d*([eE][-+]?\d+)?|[-+]?\.\d+|[-+]?\.(inf|Inf)|\.(nan|NaN))$"
    ),
    list("-+0123456789."),
)


@dataclass(frozen=True)
class Recipe:
    """A recipe as written.

    Args:
        name: `<task>/<name>` of a packaged recipe, else the file's name.
        path: the file.
        values: its content.
    """

    name: str
    path: Path
    values: dict[str, Any]


def parse_yaml(text: str) -> Any:
    """YAML without tags that run code; 1e-4 is a number."""
    return yaml.load(text, Loader=_Loader)  # noqa: S506  (a SafeLoader)


def read_yaml(path: Path) -> Any:
    """A YAML file's content.

    Raises:
        UserError: the file cannot be read or is no YAML; names the line.
    """
    try:
        return parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise UserError(f"{path} is no YAML: {line}{error.problem}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no YAML: {' '.join(str(error).split())}") from error


def recipe_names() -> list[str]:
    """Packaged recipes, `<task>/<name>`."""
    return sorted(
        str(path.relative_to(RECIPES).with_suffix(""))
        for path in RECIPES.glob("*/*.yaml")
        if path.parent.name != _VARIANTS
    )


def variants_file(name: str) -> Path:
    """The rows of a comparison, by path or by their name in the package (`recipes/variants/`).

    Raises:
        UserError: neither is there.
    """
    packaged = {path.stem: path for path in (RECIPES / _VARIANTS).glob("*.yaml")}
    path = Path(name)
    if path.is_file() or name not in packaged:
        if not path.is_file() and not name.endswith((".yaml", ".yml")):
            raise UserError(unknown_name("variants (no such file either)", name, packaged))
        return path
    return packaged[name]


def load_recipe(name: str) -> Recipe:
    """A recipe by path or by its name in the package.

    Raises:
        UserError: no such recipe (names the nearest), or a file that is not a YAML mapping.
    """
    packaged = name.removesuffix(".yaml") in recipe_names()
    path = RECIPES / f"{name.removesuffix('.yaml')}.yaml" if packaged else Path(name)
    if not path.is_file():
        what = "is a folder, no recipe file" if path.is_dir() else "does not exist"
        raise UserError(
            f"recipe file {name} {what}"
            if name.endswith((".yaml", ".yml")) or path.is_dir()
            else unknown_name("recipe", name, recipe_names())
        )
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise UserError(
            f"{path} is no recipe: it holds {type(values).__name__}, a recipe is a mapping with "
            "trainer, model and data"
        )
    return Recipe(name.removesuffix(".yaml") if packaged else path.name, path, values)


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """`--key value` and `--key=value` pairs; values are YAML.

    Raises:
        UserError: something that is no pair.
    """
    overrides: dict[str, Any] = {}
    words = list(arguments)
    while words:
        word = words.pop(0)
        key, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not key:
            raise UserError(
                f"unexpected argument '{word}'; overrides are written --key value, for example "
                "--trainer.max_steps 100"
            )
        if not equals:
            if not words or words[0].startswith("--"):
                raise UserError(f"option --{key} has no value; write --{key} VALUE")
            value = words.pop(0)
        try:
            overrides[key] = parse_yaml(value)
        except yaml.YAMLError as error:
            raise UserError(f"the value of --{key} is no YAML: {value}") from error
    return overrides


def _argument(values: Mapping[str, Any], name: str) -> Any:
    """What a recipe says of its data; None where it says nothing."""
    arguments = (
        (values.get("data") or {}).get("init_args") if isinstance(values.get("data"), Mapping) else None
    )
    return arguments.get(name) if isinstance(arguments, Mapping) else None


_OF_SOURCE = ("source", "tokenizer", "frames", "size", "rate", "stride")


def apply_overrides(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a recipe with dotted keys set; `model.x` means `model.init_args.x`, a bare name of an
    attention or a strategy becomes a mapping under a key below it.

    data.source and its arguments say what the recipe's own data.path is made of: with another data.path, or
    with data.mix, they are left out.

    Raises:
        UserError: a key below something that is no mapping.
    """
    result = deepcopy(dict(values))
    if (
        _argument(result, "source") is not None
        and {"data.path", "data.mix"} & overrides.keys()
        and "data.source" not in overrides
    ):
        overrides = {
            **{f"data.{name}": None for name in _OF_SOURCE if _argument(result, name) is not None},
            **overrides,
        }
    for key, value in overrides.items():
        here: Any = result
        *parents, last = key.split(".")
        for depth, part in enumerate([*parents, None]):
            if not isinstance(here, dict):
                raise UserError(f"--{key}: {'.'.join(parents[:depth])} is {here!r} and has no keys below it")
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
        here[last] = deepcopy(value)
    return result
