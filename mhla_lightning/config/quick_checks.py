"""Check the names in a recipe before torch and Lightning are imported, which takes seconds.

The answers come from source files (`signatures`). A name that they leave open passes here; `checks` then
judges it against the imported class.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from mhla_lightning.config.signatures import (
    ClassSource,
    class_names,
    config_of,
    find_class,
    parameters,
    source_file,
    table_of_classes,
)
from mhla_lightning.config.trainer_arguments import ADDED, check_arguments
from mhla_lightning.errors import UserError, unknown_name
from mhla_lightning.plugins import named_modules, plugins
from mhla_lightning.strategies.config import check_strategy

SECTIONS = ("imports", "seed_everything", "trainer", "model", "data", "checkpoint", "health")
_CLASSES = ("trainer", "model", "data")
_CONFIGS = {
    "checkpoint": "mhla_lightning.config.resolve.CheckpointConfig",
    "health": "mhla_lightning.config.resolve.HealthConfig",
}
_EXAMPLES = {
    "model": "mhla_lightning.tasks.ClassificationTask",
    "data": "mhla_lightning.data.ImageDataModule",
}
_OURS = "mhla_lightning."
_KNOWN = (_OURS, "lightning.", "torch.")
_CAUSAL_TASKS = ("LanguageTask", "RecallTask")
_ENTRY = "mhla_lightning.attention.entry"
_LAYERS = {
    False: ("self_attention.LayerOptions", "self_attention.SelfAttention"),
    True: ("causal_self_attention.CausalLayerOptions", "causal_self_attention.CausalSelfAttention"),
}
"""causal -> the class with the options of the layer around an operator: a dataclass, or the layer itself."""
_OPERATOR = ("heads", "dim_k", "dim_v", "grid")  # arguments that are no keys of an entry
_LAYER = {False: ("dim", "heads", "attention", "grid"), True: ("dim", "attention", "context")}


def check_names(values: Mapping[str, Any]) -> None:
    """Refuse unknown names: sections, keys, classes, a strategy, an attention.

    Raises:
        UserError: the first such name, with the nearest valid one.
    """
    trainer = find_class("lightning.pytorch.Trainer")
    check_sections(values, (parameters(trainer) if trainer is not None else None) or values["trainer"])
    for section in _CLASSES:
        _check_value(values[section], section)
    arguments = values["model"].get("init_args") or {}
    # Other packages and a Python program may have registered operators that no source file of ours shows.
    ours_alone = _ENTRY not in sys.modules and all(path.startswith(_KNOWN) for path in _class_paths(values))
    extended = named_modules(values) or plugins()
    if ours_alone and not extended and "attention" in arguments:
        causal = values["model"]["class_path"].rpartition(".")[2] in _CAUSAL_TASKS
        for key, entry in _entries(arguments["attention"], "model.attention"):
            _check_attention(entry, causal, key)


def _entries(attention: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Yield the entries of lists of any depth, each with its key."""
    if not isinstance(attention, list):
        yield key, attention
        return
    for number, entry in enumerate(attention):
        yield from _entries(entry, f"{key}.{number}")


def check_sections(values: Mapping[str, Any], trainer_names: Iterable[str]) -> None:
    """Check the sections of a recipe and the arguments of its trainer.

    Args:
        values: a recipe.
        trainer_names: the arguments of Lightning's Trainer, without ours.

    Raises:
        UserError: an unknown or missing section, or an argument that the trainer cannot have.
    """
    check_known(values, SECTIONS, "")
    for section in _CLASSES:
        if not isinstance(values.get(section), Mapping):
            raise UserError(section, "the section is missing; a recipe has mappings trainer, model and data")
    for section, path in _CONFIGS.items():
        source = find_class(path)
        if source is not None and isinstance(values.get(section), Mapping):
            check_known(values[section], parameters(source) or (), f"{section}.")
    trainer = values["trainer"]
    check_arguments(trainer)
    check_known(trainer, [*trainer_names, *ADDED], "trainer.")
    check_strategy(trainer)
    for section, example in _EXAMPLES.items():
        if "class_path" not in values[section]:
            raise UserError(f"{section}.class_path", f"it is missing; give the class, for example {example}")


def check_known(given: Iterable[Any], valid: Iterable[str], prefix: str) -> None:
    """Refuse the first key that is not valid.

    Args:
        given: keys.
        valid: the keys that are allowed.
        prefix: place of the keys in the recipe, with its dot: `model.optimizer.`.

    Raises:
        UserError: an unknown key.
    """
    names = list(valid)
    for key in given:
        if key not in names:
            raise UserError(f"{prefix}{key}", unknown_name("key", key, names))


def _check_value(value: Any, where: str) -> None:
    """Check the classes in a part of a recipe, at any depth."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            _check_value(item, f"{where}.{index}")
    if not isinstance(value, Mapping):
        return
    if "class_path" not in value:
        for key, item in value.items():
            _check_value(item, f"{where}.{key}")
        return
    check_known(value, ("class_path", "init_args"), f"{where}.")
    source = _find_ours(str(value["class_path"]), where)
    names = parameters(source) if source is not None else None
    if source is None or names is None:
        return
    arguments = value.get("init_args") or {}
    check_known(arguments, names, f"{where}.")
    for key, item in arguments.items():
        _check_argument(item, config_of(source, names[key]), f"{where}.{key}")


def _check_argument(value: Any, config: ClassSource | None, where: str) -> None:
    """Check an argument that may be a dataclass, a list of them, or hold classes."""
    if isinstance(value, list):
        for number, item in enumerate(value):
            _check_argument(item, config, f"{where}.{number}")
    elif isinstance(value, Mapping) and "class_path" not in value and config is not None:
        names = parameters(config)
        if names is not None:
            check_known(value, names, f"{where}.")
            for key, item in value.items():
                _check_argument(item, config_of(config, names[key]), f"{where}.{key}")
    elif config is None:
        _check_value(value, where)


def _find_ours(path: str, where: str) -> ClassSource | None:
    """The source of a class of ours; None where it is not ours or cannot be read."""
    source = find_class(path) if path.startswith(_OURS) else None
    module, _, name = path.rpartition(".")
    if source is None and path.startswith(_OURS):
        if source_file(module) is None:
            raise UserError(f"{where}.class_path", f"there is no module {module}")
        valid = class_names(module)
        if valid is not None:
            raise UserError(f"{where}.class_path", unknown_name(f"class of {module}", name, valid))
    return source


def _class_paths(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        if "class_path" in value:
            yield str(value["class_path"])
        for item in value.values():
            yield from _class_paths(item)
    elif isinstance(value, list):
        for item in value:
            yield from _class_paths(item)


def _check_attention(entry: Any, causal: bool, key: str) -> None:
    """Check an attention entry: the name of its operator and the keys beside it."""
    table = table_of_classes(_ENTRY, "CAUSAL_ATTENTION" if causal else "ATTENTION")
    name = entry.get("name") if isinstance(entry, Mapping) else entry
    if table is None or not isinstance(name, str) or name == "none":  # a convolutional network has none
        return
    if name not in table:
        raise UserError(key, unknown_name("causal attention" if causal else "attention", name, table))
    layers = (find_class(f"mhla_lightning.attention.layers.{path}") for path in _LAYERS[causal])
    layer = next((source for source in layers if source is not None), None)
    options = [_options(table[name], _OPERATOR), _options(layer, _LAYER[causal])]
    if isinstance(entry, Mapping) and None not in options:
        valid = ["name", "preset", *(name for names in options if names is not None for name in names)]
        for option in entry:
            if option not in valid:
                reason = unknown_name("option", option, valid, of=f"attention '{name}'")
                raise UserError(f"{key}.{option}", reason)


def _options(source: ClassSource | None, placed: Iterable[str]) -> list[str] | None:
    """The keys of an attention entry that a class takes, also those in a dataclass."""
    names = parameters(source) if source is not None else None
    if source is None or names is None:
        return None
    if source.is_dataclass:
        return list(names)
    found: list[str] = []
    for name in names.keys() - set(placed):
        config = config_of(source, names[name])
        fields = parameters(config) if config is not None else {name: None}
        if fields is None:
            return None
        found += fields
    return found
