"""The pages of all recipes and of every key of a recipe, from the code that reads them."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import types
from collections.abc import Iterator, Sequence

from docstring_parser import parse

from docs.scripts.commands import cell
from mhla_lightning import _ROOMS, callbacks, tasks
from mhla_lightning.attention.entry import ATTENTION, CAUSAL_ATTENTION
from mhla_lightning.attention.layers.causal_self_attention import CausalLayerOptions
from mhla_lightning.attention.layers.self_attention import LayerOptions
from mhla_lightning.backbones import CausalLMOptions, DiTOptions, VideoDiTOptions, ViTOptions
from mhla_lightning.cli.recipes import header_facts
from mhla_lightning.config.recipes import RECIPES, recipe_names
from mhla_lightning.config.resolve import CheckpointConfig, HealthConfig
from mhla_lightning.config.signatures import config_of, find_class, parameters
from mhla_lightning.config.trainer_arguments import ARGUMENTS

OPTIONS = {
    "image classifiers": ViTOptions,
    "language models": CausalLMOptions,
    "image diffusion": DiTOptions,
    "video diffusion": VideoDiTOptions,
}


@dataclasses.dataclass(frozen=True)
class Key:
    """A key of a recipe.

    Args:
        name: dotted, below its section.
        kind: its type, as the code annotates it.
        default: as YAML writes it; None where a recipe has to give the key.
        meaning: from the docstring.
    """

    name: str
    kind: str
    default: str | None
    meaning: str


def list_page() -> str:
    """Return the page of the recipes: a table a task."""
    names = recipe_names()
    parts = ["# Recipes\n", "`mhla recipes show NAME` prints a recipe, and every line of it has a comment.\n"]
    for task in sorted({name.partition("/")[0] for name in names}):
        parts.append(f"## {task}\n\n| recipe | purpose | paper |\n|---|---|---|")
        for name in names:
            if name.startswith(f"{task}/"):
                facts = header_facts((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
                parts.append(f"| `{name}` | {cell(facts['purpose'] or '')} | {cell(facts['paper'] or '')} |")
        parts.append("")
    return "\n".join(parts)


def page() -> str:
    """Return the page of the keys: a table a class that a recipe names."""
    parts = [
        "# Recipe keys\n",
        "This page is made from the code. A key without a default has to be in the recipe.",
        "On the command line `data.reading.num_workers` is `--data.reading.num_workers 4`.\n",
        "## Top level\n",
        "| key | meaning |\n|---|---|",
        "| `seed_everything` | seed of weights, order and noise |",
        "| `imports` | modules of yours that are imported first |",
        "| `trainer`, `model`, `data`, `checkpoint`, `health` | the sections below |\n",
        "## trainer\n",
        "| key | in a recipe | meaning |\n|---|---|---|",
        *(f"| `trainer.{name}` | {rule.handling} | {_site(rule.note)} |" for name, rule in ARGUMENTS.items()),
        "",
    ]
    for section, found in (
        ("model", _classes(_ROOMS["tasks"], tasks)),
        ("data", _classes(_ROOMS["data"], importlib.import_module("mhla_lightning.data"))),
    ):
        for cls in found:
            parts += [f"## {section}: {cls.__name__}\n", *_table(cls, f"{section}.")]
    parts += ["## checkpoint\n", *_table(CheckpointConfig, "checkpoint."), "## health\n"]
    parts += [*_table(HealthConfig, "health."), "## model.attention\n"]
    for kind, table, layer in (
        ("images and videos", ATTENTION, LayerOptions),
        ("language", CAUSAL_ATTENTION, CausalLayerOptions),
    ):
        for name, operator in table.items():
            options = operator.options_type or operator
            parts += [f"### {name} ({kind})\n", *_table(options, "", operator.options())]
        parts += [f"### The layer around any operator ({kind})\n", *_table(layer, "")]
    parts.append("## model.backbone_options\n")
    for family, options in OPTIONS.items():
        parts += [f"### {family[0].upper()}{family[1:]}\n", *_table(options, "")]
    parts.append("## trainer.callbacks\n")
    for cls in _classes(_ROOMS["callbacks"], callbacks):
        parts += [f"### {cls.__name__}\n", *_table(cls, "")]
    return "\n".join(parts)


def _site(note: str) -> str:
    """Return a note of docs/trainer-arguments.md with links that work from the page of keys."""
    note = note.replace("](#", "](trainer-arguments.md#")
    return cell(re.sub(r"\]\((\w[\w-]*\.md)", r"](../\1", note))


def _classes(names: tuple[str, ...], module: types.ModuleType) -> list[type]:
    found = [getattr(module, name) for name in names]
    return [cls for cls in found if not inspect.isabstract(cls) and cls is not tasks.Task]


def _table(cls: type, prefix: str, only: Sequence[str] | None = None) -> Iterator[str]:
    summary = parse(inspect.getdoc(cls) or "").short_description
    if summary:
        yield f"{summary}\n"
    rows = [key for key in keys(cls) if only is None or key.name in only]
    if not rows:
        yield "No options.\n"
        return
    yield "| key | type | default | meaning |\n|---|---|---|---|"
    for key in rows:
        default = "" if key.default is None else f"`{key.default}`"
        yield f"| `{prefix}{key.name}` | {cell(key.kind)} | {cell(default)} | {cell(key.meaning)} |"
    yield ""


def keys(cls: type, prefix: str = "") -> Iterator[Key]:
    """Yield the keys of a class, each before the keys of its own dataclass."""
    source = find_class(f"{cls.__module__}.{cls.__qualname__}")
    annotations = parameters(source) if source is not None else None
    given = _given(cls)
    if not given:
        return
    if source is None or annotations is None:
        raise LookupError(f"the arguments of {cls.__qualname__} cannot be read from its source")
    meanings = documented(cls)
    for name, annotation in annotations.items():
        kind = ast.unparse(annotation) if annotation is not None else ""
        yield Key(prefix + name, kind, _default(given[name]), meanings.get(name, ""))
        inner = config_of(source, annotation)
        if inner is not None:
            found = getattr(importlib.import_module(inner.module), inner.node.name)
            yield from keys(found, f"{prefix}{name}.")


def _given(cls: type) -> dict[str, inspect.Parameter]:
    """The arguments of a class and of its bases, which `**kwargs` pass on."""
    found: dict[str, inspect.Parameter] = {}
    for base in reversed(cls.__mro__[:-1]):
        if "__init__" in base.__dict__:
            found |= inspect.signature(base).parameters
    return found


def documented(cls: type) -> dict[str, str]:
    """Return the meaning of each argument, from the docstrings of a class and of its bases."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        for text in (base.__dict__.get("__doc__"), getattr(base.__dict__.get("__init__"), "__doc__", None)):
            for parameter in parse(inspect.cleandoc(text or "")).params:
                meaning = " ".join((parameter.description or "").split())
                found |= {name.strip(): meaning for name in parameter.arg_name.split(",")}
    return found


def _default(parameter: inspect.Parameter) -> str | None:
    value = parameter.default
    if value is parameter.empty:
        return None
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "null"
    return str(list(value)) if isinstance(value, tuple) else str(value)
