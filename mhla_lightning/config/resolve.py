"""Build the objects of a recipe; Lightning's parser checks types and fills defaults."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import yaml
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from mhla_lightning.arguments.hints import argument_hints
from mhla_lightning.config.checks import check_keys
from mhla_lightning.config.mistakes import find_mistake, placed, user_error
from mhla_lightning.config.moved_keys import flat, moved
from mhla_lightning.config.recipes import argument
from mhla_lightning.config.trainer_arguments import ADDED, check_built
from mhla_lightning.data.modules.base import ShardDataModule
from mhla_lightning.errors import UserError, inside
from mhla_lightning.plugins import KEY, load_plugins
from mhla_lightning.strategies.config import is_zero
from mhla_lightning.strategies.sharding import sharding_of
from mhla_lightning.tasks import Task


@dataclass(frozen=True)
class CheckpointConfig:
    """How often a run saves, how, and which checkpoints stay.

    Args:
        every_n_steps: optimizer steps between two checkpoints.
        keep_last: number of newest checkpoints that stay.
        keep_best: number of further checkpoints that stay, the best by `monitor`.
        monitor: a tag of validation, such as val/loss. Accuracies are best high, all other tags low.
        asynchronous: write while training goes on, from copies in the host's memory.
    """

    every_n_steps: int = 1000
    keep_last: int = 3
    keep_best: int = 0
    monitor: str | None = None
    asynchronous: bool = False

    def __post_init__(self) -> None:
        for name, least in (("every_n_steps", 1), ("keep_last", 1), ("keep_best", 0)):
            if getattr(self, name) < least:
                raise UserError(name, f"{getattr(self, name)} is too low; it must be at least {least}")
        if bool(self.keep_best) != (self.monitor is not None):
            raise UserError(
                "keep_best",
                f"it is {self.keep_best} and `checkpoint.monitor` is {self.monitor}: give both, for example "
                "2 and val/loss, or neither",
            )


@dataclass(frozen=True)
class HealthConfig:
    """What a run does about steps that would spoil it.

    Args:
        max_skipped: optimizer steps in a row that may be skipped because their loss or gradients are not
            finite, or the loss leaps.
        spike_factor: skip a step whose loss is above this multiple of the median of the steps before; None
            never skips for that.
    """

    max_skipped: int = 10
    spike_factor: float | None = None

    def __post_init__(self) -> None:
        if self.max_skipped < 0:
            raise UserError(
                "max_skipped",
                f"{self.max_skipped} is too low; it must be at least 0, which stops at the first",
            )
        if self.spike_factor is not None and not self.spike_factor > 1:
            raise UserError("spike_factor", f"{self.spike_factor} is too low; it must be above 1, or null")


@dataclass
class Resolved:
    """A recipe with every default filled in, and the objects that it builds.

    Attributes:
        values: plain mapping, as written to recipe.yaml.
        task, data: built, without weights and without opened shards.
        trainer: arguments of Lightning's Trainer, callbacks built.
        checkpoint, health: how the run saves, and what it does about bad steps.
        seed: of everything random.
        matmul_precision: of float32 matrix products on a GPU; None leaves torch's.
    """

    values: dict[str, Any]
    task: Task
    data: ShardDataModule
    trainer: dict[str, Any]
    checkpoint: CheckpointConfig
    health: HealthConfig
    seed: int
    matmul_precision: str | None = None

    def to_yaml(self) -> str:
        """Return the recipe as YAML."""
        return yaml.safe_dump(self.values, sort_keys=False)

    def identity(self) -> dict[str, Any]:
        """Return the recipe without where it runs: run ids and resumes compare this.

        Moved keys are in their old places, so that run ids stay the same.
        """
        return _without_place(self.values)

    def take_from_data(self) -> None:
        """Replace each `auto` of the model by what the data tell; they are packed by now.

        The identity of the recipe changes, so a run is named before.

        Raises:
            UserError: there are no shards, or they do not tell it.
        """
        if not self.task.waits_for_data:
            return
        if not self.data.is_ready():
            raise UserError(
                "model.num_classes",
                f"it is auto, and {self.data.path} holds no shards that tell the number; pack the data, or "
                "give the number",
            )
        with inside("model"):
            found = self.task.take_from_data(self.data.facts())
        self.task.hparams.update(found)
        self.values["model"]["init_args"] |= found


def resolve(values: Mapping[str, Any]) -> Resolved:
    """Check a recipe's keys and types and build its objects.

    The installed plugins and the modules under `imports` are imported first.

    Args:
        values: a recipe; old keys are moved to their new places.

    Raises:
        UserError: the first key or value that is wrong.
    """
    values = moved(values)
    load_plugins(values)
    check_keys(values)
    given = dict(values["trainer"])
    strategy, own = given.get("strategy"), {name: given.pop(name) for name in ADDED if name in given}
    if is_zero(strategy):  # Lightning's parser knows its own strategies only
        given["strategy"] = "auto"
    seed = values.get("seed_everything", 0)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise UserError("seed_everything", f"{seed!r} is no seed; it is a whole number from 0 to 4294967295")
    own_code = {KEY: list(values[KEY])} if values.get(KEY) else {}
    dumped: dict[str, Any] = {**own_code, "seed_everything": seed}
    built: dict[str, Any] = {}
    for name, kind, value in (
        ("trainer", Trainer, given),
        ("model", Task, values["model"]),
        ("data", LightningDataModule, values["data"]),
        ("checkpoint", CheckpointConfig, values.get("checkpoint")),
        ("health", HealthConfig, values.get("health")),
    ):
        dumped[name], built[name] = _section(name, kind, value)
    if not isinstance(built["data"], ShardDataModule):
        path = values["data"]["class_path"]
        raise UserError("data.class_path", f"{path} is no data module of mhla_lightning.data")
    trainer = {key: value for key, value in vars(built["trainer"]).items() if value is not None}
    check_built(trainer.get("callbacks"))
    if isinstance(trainer.get("strategy"), Strategy):
        sharding_of(trainer["strategy"])  # refuses a class that callbacks cannot read
    if is_zero(strategy):
        trainer["strategy"] = dumped["trainer"]["strategy"] = deepcopy(strategy)
    dumped["trainer"] |= {name: value for name, value in own.items() if value is not None}
    return Resolved(
        dumped, built["model"], built["data"], trainer, built["checkpoint"], built["health"], seed, **own
    )


def _section(name: str, kind: type, value: Any) -> tuple[Any, Any]:
    """Check a section of a recipe: (its values with every default, what they build)."""
    parser = LightningArgumentParser(exit_on_error=False)
    if dataclasses.is_dataclass(kind):
        parser.add_class_arguments(kind, name)
    else:
        parser.add_lightning_class_args(kind, name, subclass_mode=kind is not Trainer)
    try:
        config = parser.parse_object({} if value is None else {name: deepcopy(value)})
        dumped = yaml.safe_load(parser.dump(config, skip_unset=False, skip_validation=True))
        return dumped[name], parser.instantiate(config)[name]
    except (  # ImportError: a class of a package that is not installed
        *(argparse.ArgumentError, TypeError, ValueError, ImportError),
        *(MisconfigurationException, UserError),
    ) as error:
        raise _mistake(name, kind, value, error) from error


def _mistake(name: str, kind: type, value: Any, error: Exception) -> UserError:
    """The error of a section that does not fit: its key, what was found and what is allowed."""
    if kind is Trainer:  # which is not built yet
        hints = argument_hints(Trainer)
        found = (find_mistake(item, hints[key], f"{name}.{key}") for key, item in value.items())
        mistake = next((one for one in found if one is not None), None)
    else:
        mistake = find_mistake(value, kind, name)
    own = user_error(error)
    if mistake is None and own is not None:
        return placed(own, name)
    return mistake or UserError(name, " ".join(str(error).split()))


def differences(old: Mapping[str, Any], new: Mapping[str, Any], limit: int = 3) -> str:
    """Return the keys in which two resolved recipes differ, as `key old -> new`.

    The text is empty where they agree. Where a recipe runs makes no difference, nor do the strategy, the
    time of one start and the checkpoints that are saved.

    Args:
        old, new: resolved recipes, with moved keys in their old or their new places.
        limit: keys that are written out.
    """
    before, after = (_compared(values) for values in (old, new))
    keys = changed_keys(old, new)
    shown = ", ".join(
        f"{key.replace('.init_args.', '.')} {before.get(key)} -> {after.get(key)}" for key in keys[:limit]
    )
    return shown + (f" and {len(keys) - limit} more" if len(keys) > limit else "")


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return the dotted keys in which two resolved recipes differ.

    Where data is makes no difference, see :func:`differences`.
    """
    before, after = _compared(old), _compared(new)
    left_out: set[str] = set()
    if None in (argument(old, "data.source"), argument(new, "data.source")):
        left_out = {f"data.init_args.{key}" for key in _MAKING_OF_DATA}
    return [
        key
        for key in {**before, **after}
        if before.get(key) != after.get(key)
        and key not in left_out
        and not _checked_with_data(key, after)
        and not _told_by_data(key, before.get(key), after.get(key))
    ]


def _compared(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in _dotted(_without_place(values)).items() if not _may_change(key)}


_MAKING_OF_DATA = (
    *("length", "val_length", "packing", "val"),
    *("frames", "size", "rate", "stride", "shots"),
)
"""How `data.source` is packed. It says nothing about shards that a recipe names by their place alone; the
hashes in a checkpoint identify those.
"""
_CHECKED_WITH_DATA = ("tokenizer", "vae.name", "vae.sha256", "text_encoder.name", "text_encoder.sha256")
"""Names, often folders, of what has made the shards. The data module compares the content with the shards."""


def _checked_with_data(key: str, values: Mapping[str, Any]) -> bool:
    name = key.removeprefix("data.init_args.")
    encoded_in_training = name.startswith("text_encoder.") and "data.init_args.vae.name" not in values
    return name in _CHECKED_WITH_DATA and name != key and not encoded_in_training


def _told_by_data(key: str, before: Any, after: Any) -> bool:
    """Whether a value is `auto`; the hashes in a checkpoint identify the data that tell it."""
    return key == "model.init_args.num_classes" and "auto" in (before, after)


_PLACE_OF_DATA = ("path", "source", "remote", "num_workers", "micro_batch_size", "loading", "verify")
_PLACE_OF_TRAINER = ("devices", "num_nodes", "matmul_precision")
"""Where data is, how it is fetched, the devices and the precision of their products may change between two
attempts of a run, and so may further loggers. The global batch may not.
"""


def _may_change(key: str) -> bool:
    """Whether a run may be resumed with another value of a key."""
    return key.startswith(("trainer.strategy.", "trainer.max_time.", "checkpoint.")) or key in (
        "trainer.strategy",
        "trainer.max_time",
    )


_GAINED = {"mhla_lightning.callbacks.SampleGrids": {"prompts": None}}
_GAINED_BY_DATA = {"text_encoder": {"instruction": None}}
"""Arguments that callbacks and parts of data modules have gained.

Each has the value that leaves its owner as it was: run ids and resumes of older recipes stay.
"""


def _without_place(values: Mapping[str, Any]) -> dict[str, Any]:
    """A resolved recipe in the old, flat form, without the keys that say where it runs."""
    kept = flat(values)
    arguments = kept["data"]["init_args"]
    callbacks = kept["trainer"].get("callbacks") or ()
    gained = [(one.get("init_args"), _GAINED.get(one.get("class_path"), {})) for one in callbacks]
    gained += [(arguments.get(part), neutral) for part, neutral in _GAINED_BY_DATA.items()]
    for given, neutral in gained:
        for name, value in neutral.items():
            if given and name in given and given[name] == value:
                del given[name]
    for section, keys in ((arguments, _PLACE_OF_DATA), (kept["trainer"], _PLACE_OF_TRAINER)):
        for key in keys:
            section.pop(key, None)
    if kept["trainer"].get("logger") is not None:
        kept["trainer"]["logger"] = None
    for source in arguments.get("mix") or ():
        source.pop("path", None)
    return kept


def _dotted(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping with dotted keys."""
    if isinstance(value, Mapping) and value:
        return {
            key: item
            for name, inner in value.items()
            for key, item in _dotted(inner, f"{prefix}.{name}" if prefix else name).items()
        }
    return {prefix: value}
