"""From a recipe to objects: Lightning's own parser checks the types and fills the defaults."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import yaml
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.strategies import Strategy

from mhla_lightning.config.checks import check_keys, one_sentence
from mhla_lightning.data.modules.base import ShardDataModule
from mhla_lightning.errors import UserError
from mhla_lightning.strategies.config import is_zero
from mhla_lightning.strategies.sharding import sharding_of
from mhla_lightning.tasks import Task


@dataclass(frozen=True)
class CheckpointConfig:
    """How often a run saves, how, and what is kept.

    Args:
        every_n_steps: optimizer steps between two checkpoints.
        keep_last: complete checkpoints kept.
        keep_best: so many more, the best by `monitor`.
        monitor: a tag of validation, such as val/loss; accuracies are best high, all others low.
        asynchronous: write beside the training, from copies in the host's memory.
    """

    every_n_steps: int = 1000
    keep_last: int = 3
    keep_best: int = 0
    monitor: str | None = None
    asynchronous: bool = False

    def __post_init__(self) -> None:
        for name, least in (("every_n_steps", 1), ("keep_last", 1), ("keep_best", 0)):
            if getattr(self, name) < least:
                raise UserError(f"checkpoint.{name} is {getattr(self, name)}; it must be at least {least}")
        if bool(self.keep_best) != (self.monitor is not None):
            raise UserError(
                f"checkpoint.keep_best is {self.keep_best} and checkpoint.monitor {self.monitor}: "
                "give both, for example 2 and val/loss, or neither"
            )


@dataclass(frozen=True)
class HealthConfig:
    """What a run does about steps that would spoil it.

    Args:
        max_skipped: optimizer steps in a row that may be left out because their loss or gradients are not
            finite, or leap.
        spike_factor: leave out a step whose loss is more than so many times the median of the steps before;
            null does not look.
    """

    max_skipped: int = 10
    spike_factor: float | None = None

    def __post_init__(self) -> None:
        if self.max_skipped < 0:
            raise UserError(
                f"health.max_skipped is {self.max_skipped}; it must be at least 0, which stops at the first"
            )
        if self.spike_factor is not None and not self.spike_factor > 1:
            raise UserError(f"health.spike_factor is {self.spike_factor}; it must be above 1, or null")


@dataclass
class Resolved:
    """A recipe with every default filled in, and what it builds.

    Attributes:
        values: plain mapping, as written to recipe.yaml.
        task, data: built, without weights and without opened shards.
        trainer: arguments of Trainer, callbacks built.
    """

    values: dict[str, Any]
    task: Task
    data: ShardDataModule
    trainer: dict[str, Any]
    checkpoint: CheckpointConfig
    health: HealthConfig
    seed: int

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.values, sort_keys=False)

    def identity(self) -> dict[str, Any]:
        """The recipe without where it runs: what a run id and a resume compare."""
        return _without_place(self.values)


def resolve(values: Mapping[str, Any]) -> Resolved:
    """Checks a recipe's keys and types and builds its objects.

    Raises:
        UserError: one sentence on the first thing that is wrong.
    """
    check_keys(values)
    strategy = values["trainer"].get("strategy")
    if is_zero(strategy):  # Lightning's parser knows its own strategies only
        values = {**values, "trainer": {**values["trainer"], "strategy": "auto"}}
    parser = _parser()
    try:
        config = parser.parse_object(deepcopy(dict(values)))
        dumped = yaml.safe_load(parser.dump(config, skip_unset=False))
        built = parser.instantiate(config)
    except (argparse.ArgumentError, TypeError, ValueError) as error:
        raise UserError(one_sentence(error)) from error
    if not 0 <= config.seed_everything < 2**32:
        raise UserError(f"seed_everything is {config.seed_everything}; a seed lies in 0 to 4294967295")
    task, data = built.model, built.data
    if not isinstance(task, Task):
        raise UserError(
            f"model.class_path {values['model']['class_path']} is no task of mhla_lightning.tasks"
        )
    if not isinstance(data, ShardDataModule):
        raise UserError(
            f"data.class_path {values['data']['class_path']} is no data module of mhla_lightning.data"
        )
    trainer = vars(built.trainer)
    trainer = {key: value for key, value in trainer.items() if value is not None}
    if isinstance(trainer.get("strategy"), Strategy):
        sharding_of(trainer["strategy"])  # refuses a class that callbacks cannot read
    if is_zero(strategy):
        trainer["strategy"] = dumped["trainer"]["strategy"] = deepcopy(strategy)
    return Resolved(dumped, task, data, trainer, built.checkpoint, built.health, config.seed_everything)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], limit: int = 3) -> str:
    """The keys in which two resolved recipes differ, as `key old -> new`, where they run aside; empty when
    they do not.
    """
    before, after = (
        {key: value for key, value in _flat(_without_place(values)).items() if not _changes_no_number(key)}
        for values in (old, new)
    )
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    shown = ", ".join(f"{key} {before.get(key)} -> {after.get(key)}" for key in keys[:limit])
    return shown + (f" and {len(keys) - limit} more" if len(keys) > limit else "")


# What may change between two attempts of one run: where data is, how it is fetched, on how many devices it is
# trained. The global batch stays.
_PLACE_OF_DATA = ("path", "source", "remote", "num_workers", "micro_batch_size", "loading", "verify")
_PLACE_OF_TRAINER = ("devices", "num_nodes")


def _changes_no_number(key: str) -> bool:
    """Where the numbers lie, and what of them is saved when: with another such key a run has another
    default id, but it may be resumed.
    """
    return key == "trainer.strategy" or key.startswith(("trainer.strategy.", "checkpoint."))


def _without_place(values: Mapping[str, Any]) -> dict[str, Any]:
    kept = deepcopy(dict(values))
    arguments = kept["data"]["init_args"]
    for section, keys in ((arguments, _PLACE_OF_DATA), (kept["trainer"], _PLACE_OF_TRAINER)):
        for key in keys:
            section.pop(key, None)
    for source in arguments.get("mix") or ():
        source.pop("path", None)
    return kept


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping) and value:
        return {
            key: item
            for name, inner in value.items()
            for key, item in _flat(inner, f"{prefix}.{name}" if prefix else name).items()
        }
    return {prefix: value}


def _parser() -> LightningArgumentParser:
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_argument("--seed_everything", type=int, default=0)
    parser.add_lightning_class_args(Trainer, "trainer")
    parser.add_lightning_class_args(Task, "model", subclass_mode=True)
    parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True)
    parser.add_class_arguments(CheckpointConfig, "checkpoint")
    parser.add_class_arguments(HealthConfig, "health")
    return parser
