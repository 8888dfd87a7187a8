"""Recipe keys that have moved: one table of the old place and the new one. Imports no torch.

Related arguments of data modules and losses are grouped: `data.num_workers` is now
`data.reading.num_workers`. The old names work in recipes, in overrides and in the recipe.yaml of earlier
runs. Run ids and resumes compare the old, flat form, so that earlier runs keep their ids.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from typing import Any

from mhla_lightning.config.signatures import find_class, parameters
from mhla_lightning.errors import UserError

log = logging.getLogger(__name__)
_OURS = "mhla_lightning."


@dataclass(frozen=True)
class MovedKey:
    """An argument that has moved into a group.

    Args:
        old: its name when it was an argument of the class itself.
        group: the argument that holds it now, under the same name.
        default: the value that the old form had where a recipe gives none.
        added: the old class lacked the argument; the flat form shows it only where it is not the default.
    """

    old: str
    group: str
    default: Any = None
    added: bool = False

    @property
    def new(self) -> str:
        """The new place, dotted."""
        return f"{self.group}.{self.old}"


def _data(workers: int, mix_by_is_new: bool, *own: MovedKey) -> tuple[MovedKey, ...]:
    return (
        *own,
        MovedKey("seed", "order"),
        MovedKey("lanes", "order", 48),
        MovedKey("window", "order", 2048),
        MovedKey("mix_by", "order", "sample", mix_by_is_new),
        MovedKey("buckets", "order", added=True),
        MovedKey("num_workers", "reading", workers),
        MovedKey("max_skipped_share", "reading", 0.01),
        MovedKey("verify", "reading", "auto"),
        MovedKey("loading", "reading"),
        MovedKey("remote", "reading"),
    )


_LANGUAGE = (MovedKey("isolate_documents", "loss", True), MovedKey("z_loss", "loss", 0.0))
_DIFFUSION = (MovedKey("time_bins", "loss", 4), MovedKey("distill", "loss"))

MOVED: dict[str, dict[str, tuple[MovedKey, ...]]] = {
    "model": {
        "ClassificationTask": (
            MovedKey("label_smoothing", "loss", 0.1),
            MovedKey("mixup", "loss", 0.0),
            MovedKey("cutmix", "loss", 0.0),
            MovedKey("mixup_prob", "loss", 1.0),
            MovedKey("mixup_switch_prob", "loss", 0.5),
        ),
        "LanguageTask": _LANGUAGE,
        "RecallTask": _LANGUAGE,
        "ImageDiffusionTask": (
            MovedKey("label_dropout", "loss", 0.1),
            *_DIFFUSION,
            MovedKey("num_classes", "backbone_options", 1000),
        ),
        "VideoDiffusionTask": (MovedKey("text_dropout", "loss", 0.1), *_DIFFUSION),
    },
    "data": {
        "ImageDataModule": _data(4, True),
        "LatentDataModule": _data(2, False),
        "TokenDataModule": _data(
            1,
            True,
            MovedKey("tokenizer", "text"),
            MovedKey("length", "text"),
            MovedKey("val_length", "text"),
            MovedKey("packing", "text", "best-fit"),
            MovedKey("val", "text"),
        ),
        "ClipDataModule": _data(
            2,
            False,
            MovedKey("frames", "clips"),
            MovedKey("size", "clips"),
            MovedKey("rate", "clips"),
            MovedKey("stride", "clips"),
            MovedKey("shots", "clips", True),
            MovedKey("val", "clips", 0.2),
            MovedKey("flip", "clips", 0.0),
        ),
    },
}
"""Section of a recipe -> name of the class in it -> its arguments that have moved."""


ADDED: dict[str, dict[str, Any]] = {"model": {"compile": None, "eval_sizes": None}}
"""Section of a recipe -> arguments that earlier versions lacked, and their defaults.

The flat form leaves them out where they have their default.
"""


def moved(values: Mapping[str, Any], told: bool = False) -> dict[str, Any]:
    """Return a recipe with every old key in its new place; the recipe itself stays as it is.

    Args:
        values: a recipe, in the old form, the new one or a mixture.
        told: log a line for each key that moves, for recipes that a user has written.

    Raises:
        UserError: a key is given in its old and in its new place.
    """
    result = deepcopy(dict(values))
    _move_compile(result)
    for section, arguments, key in _entries(result):
        if key.old not in arguments:
            continue
        group = arguments.get(key.group)
        group = dict(group) if isinstance(group, Mapping) else {}
        if key.old in group:
            raise UserError(
                f"{section}.{key.old}",
                f"the recipe gives it twice: it is now `{section}.{key.new}`, which is given too",
            )
        arguments[key.group] = {**group, key.old: arguments.pop(key.old)}
        if told:
            _tell(f"{section}.{key.old}", f"{section}.{key.new}")
    return result


def flat(values: Mapping[str, Any], filled: bool = True) -> dict[str, Any]:
    """Return a recipe with every moved key in its old place, as run ids see it.

    Args:
        values: a recipe, in the old form, the new one or a mixture.
        filled: a resolved recipe, in which keys without a value have their default.
    """
    result = deepcopy(dict(values))
    groups: list[tuple[dict[str, Any], str]] = []
    for _, arguments, key in _entries(result):
        group = arguments.get(key.group)
        if isinstance(group, Mapping) and key.old in group:
            value = group[key.old]
            arguments[key.group] = {name: item for name, item in group.items() if name != key.old}
        elif key.old in arguments or not filled:
            continue
        else:
            value = key.default
        groups.append((arguments, key.group))
        if not (key.added and value == key.default):
            arguments[key.old] = value
    for section, added in ADDED.items():
        arguments = (result.get(section) or {}).get("init_args") or {}
        for name in added:
            if name in arguments and arguments[name] == added[name]:
                del arguments[name]
    for arguments, name in groups:
        if name in arguments and not arguments[name]:
            if name == "backbone_options":
                arguments[name] = None
            else:
                del arguments[name]
    return result


def moved_name(name: str, values: Mapping[str, Any], told: bool = False) -> str:
    """Return the new place of a dotted key, such as an override's; other keys stay as they are.

    Args:
        name: dotted key, such as `data.remote.retries`, with or without `init_args`.
        values: the recipe that the key belongs to; it names the classes.
        told: log a line where the key has moved.
    """
    section, *parts = name.split(".")
    if parts[:1] == ["init_args"]:
        parts = parts[1:]
    for key in _keys(section, values) if parts else ():
        if key.old == parts[0]:
            new = ".".join([section, key.group, *parts])
            if told:
                _tell(f"{section}.{key.old}", f"{section}.{key.new}")
            return new
    return name


def _move_compile(values: dict[str, Any]) -> None:
    """Turn the language model's old option `backbone_options.compile` into the task's `compile`."""
    arguments = (values.get("model") or {}).get("init_args") or {}
    options = arguments.get("backbone_options")
    if isinstance(options, Mapping) and "compile" in options:
        compiled = options["compile"]
        arguments["backbone_options"] = {name: x for name, x in options.items() if name != "compile"}
        if compiled:
            arguments.setdefault("compile", "blocks")


def _entries(values: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any], MovedKey]]:
    """(section, the mapping of its arguments, key) of every key that may have moved."""
    for section in MOVED:
        for key in _keys(section, values):
            if isinstance(values[section].get("init_args"), dict):
                yield section, values[section]["init_args"], key


def _keys(section: str, values: Mapping[str, Any]) -> tuple[MovedKey, ...]:
    entry = values.get(section)
    path = entry.get("class_path") if isinstance(entry, Mapping) else None
    if section not in MOVED or not isinstance(path, str) or not path.startswith(_OURS):
        return ()
    own = _parameters(path)
    return tuple(key for key in MOVED[section].get(path.rpartition(".")[2], ()) if key.old not in own)


@cache
def _parameters(path: str) -> frozenset[str]:
    """The arguments of a class: a key that is still one of them has not moved."""
    source = find_class(path)
    return frozenset((parameters(source) if source is not None else None) or ())


@cache
def _tell(old: str, new: str) -> None:
    """Log a moved key, once in a process."""
    log.warning(f"{old} is now {new}; the old name works in this version")
