"""Every key of a recipe is checked against the signature it will be handed to, with the nearest valid name
in the error.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import types
import typing
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer

from mhla_lightning.errors import UserError, unknown_name
from mhla_lightning.strategies.config import check_strategy

SECTIONS = ("seed_everything", "trainer", "model", "data", "checkpoint", "health")
_OURS = {
    "logger": "the run folder has its own logger",
    "default_root_dir": "a run lives in its run folder (--runs, --run-id)",
    "accumulate_grad_batches": "it follows from data.batch_size and data.micro_batch_size",
    "max_epochs": "trainer.max_steps or data.epochs is the one length",
    "enable_checkpointing": "the run command saves checkpoints (checkpoint.every_n_steps)",
    "use_distributed_sampler": "shards are split by the data module",
    "reload_dataloaders_every_n_epochs": "training is one endless epoch",
}


def check_keys(values: Mapping[str, Any]) -> None:
    """Checks sections, trainer keys and the arguments of every class that the recipe names.

    Raises:
        UserError: the first key that nothing takes.
    """
    _known("key", values, SECTIONS, "")
    for section in ("trainer", "model", "data"):
        if not isinstance(values.get(section), Mapping):
            raise UserError(f"the recipe has no mapping '{section}'; it needs trainer, model and data")
    trainer = values["trainer"]
    for key, reason in _OURS.items():
        if trainer.get(key) is not None:
            raise UserError(f"trainer.{key} cannot be set: {reason}")
    _known("key", trainer, inspect.signature(Trainer.__init__).parameters, "trainer.")
    check_strategy(trainer)
    for key, low in (("val_check_interval", 1), ("max_steps", -1)):
        value = trainer.get(key)
        if isinstance(value, float) or (isinstance(value, int) and (value < low or value == 0)):
            raise UserError(f"trainer.{key} is {value}; it counts optimizer steps: a whole number from 1")
    for section in ("model", "data"):
        if "class_path" not in values[section]:
            raise UserError(
                f"{section}.class_path is missing: the class to build, for example {_EXAMPLES[section]}"
            )
    for section in ("trainer", "model", "data"):
        _check_value(values[section], section)


_EXAMPLES = {
    "model": "mhla_lightning.tasks.ClassificationTask",
    "data": "mhla_lightning.data.ImageDataModule",
}


def _known(kind: str, given: Mapping[str, Any], valid: typing.Iterable[str], prefix: str) -> None:
    names = [name for name in valid if name != "self"]
    for key in given:
        if key not in names:
            raise UserError(unknown_name(kind, f"{prefix}{key}", [f"{prefix}{name}" for name in names]))


def _check_value(value: Any, where: str) -> None:
    if isinstance(value, list):
        for index, item in enumerate(value):
            _check_value(item, f"{where}.{index}")
    if not isinstance(value, Mapping):
        return
    if "class_path" not in value:
        for key, item in value.items():
            _check_value(item, f"{where}.{key}")
        return
    _known("key", value, ("class_path", "init_args"), f"{where}.")
    arguments = value.get("init_args") or {}
    target = import_class(str(value["class_path"]), where)
    parameters = inspect.signature(target).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        _known("key", arguments, parameters, f"{where}.")
    hints = typing.get_type_hints(inspect.getattr_static(target, "__init__"))
    for key, item in arguments.items():
        config = _dataclass_in(hints.get(key))
        if config is not None and isinstance(item, Mapping):
            _known("key", item, [f.name for f in dataclasses.fields(config)], f"{where}.{key}.")
        elif isinstance(item, list):
            _check_list(item, config, f"{where}.{key}")


def _check_list(items: list[Any], config: Any, where: str) -> None:
    """A list of configurations, or of values that may hold classes."""
    for number, item in enumerate(items):
        if config is not None and isinstance(item, Mapping):
            _known("key", item, [f.name for f in dataclasses.fields(config)], f"{where}.{number}.")
        else:
            _check_value(item, f"{where}.{number}")


def import_class(path: str, where: str) -> type:
    """The class of a dotted path.

    Raises:
        UserError: no such module or name.
    """
    module, _, name = path.rpartition(".")
    try:
        loaded = importlib.import_module(module)
    except (ImportError, ValueError) as error:
        raise UserError(f"{where}.class_path '{path}': {error}") from error
    if not isinstance(getattr(loaded, name, None), type):
        valid = [
            n for n in getattr(loaded, "__all__", dir(loaded)) if isinstance(getattr(loaded, n, None), type)
        ]
        raise UserError(unknown_name(f"class in {module}", name, valid))
    return getattr(loaded, name)


def _dataclass_in(hint: Any) -> Any:
    """The dataclass of an annotation `Config`, `Config | None` or `list[Config] | None`."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    options = tuple(inner for option in options for inner in (typing.get_args(option) or (option,)))
    return next(
        (option for option in options if isinstance(option, type) and dataclasses.is_dataclass(option)), None
    )


_FRAME = re.compile(
    r"Does not validate|Subtypes:|Errors:|Problem with|Expected a|Not a valid|Subclass types|a class "
    r"path|a dict"
)


def one_sentence(error: Exception) -> str:
    """The parser's nested report as `model.optimizer.lr: expected a float, got abc`; a sentence of ours
    inside it stands as it is.
    """
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, UserError):
            return str(inner)
        inner = inner.__cause__ or inner.__context__
    path: list[str] = []
    reason, value = "", ""
    allowed: list[str] = []
    for line in str(error).splitlines():
        text = line.strip().removeprefix("- ")
        if key := re.fullmatch(r'Parser key "(.+)":', text):
            path.append(key[1])
        elif wrong := re.fullmatch(r"Expected an? (?:<class ')?(.+?)(?:'>)?\. Got value: (.*)", text):
            reason = reason or f"expected {wrong[1].removeprefix('typing.Literal')}, got {wrong[2]}"
        elif option := re.fullmatch(r"Expected an? (?:typing\.)?(?:<class ')?(?:Literal)?(.+?)(?:'>)?", text):
            allowed.append(option[1].strip("[]"))
        elif given := re.fullmatch(r"Given value: (.*)", text):
            value = value or given[1]
        elif text and not _FRAME.match(text) and not text.startswith("Given value type"):
            reason = reason or text
    place = f"{'.'.join(path)}: " if path else ""
    return place + (
        reason
        or f"{value} does not fit; allowed: {', '.join(name for name in allowed if name != 'NoneType')}"
    )
