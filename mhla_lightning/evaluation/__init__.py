"""Benchmarks of trained models, and the table of those that `mhla compare --eval` runs on finished runs.
Importing this imports no torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mhla_lightning.config.recipes import parse_yaml
from mhla_lightning.errors import UserError, unknown_name
from mhla_lightning.evaluation.samples import SampleOptions, check_samples, fix_samples, measure_samples
from mhla_lightning.runs.folder import FORMAT, RunFolder, newest_checkpoint, read_json, write_json


@dataclass(frozen=True)
class Evaluation:
    """What `--eval NAME` stands for.

    Attributes:
        options: a frozen dataclass; its fields are the options, and it raises UserError for values that
            cannot be.
        measure: (run folder, options) -> numbers.
        higher: numbers that are best high; all others are best low.
        fix: (options, runs) -> (values that replace options, values that stand for options where results are
            kept): names of other runs become
            folders, and what those hold. runs: where run folders live, None is $MHLA_RUNS, else ./runs.
        check: (options, task, data), before training, raises UserError for a run that cannot be measured so.
    """

    options: type[Any]
    measure: Callable[[RunFolder, Any], dict[str, float]]
    higher: frozenset[str] = frozenset()
    fix: Callable[[Any, str | None], tuple[dict[str, Any], dict[str, Any]]] = lambda options, runs: ({}, {})
    check: Callable[[Any, Any, Any], None] = lambda options, task, data: None


EVALUATIONS: dict[str, Evaluation] = {
    "samples": Evaluation(
        options=SampleOptions,
        measure=measure_samples,
        higher=frozenset({"agreement", "class_score", "precision", "recall", "images_per_second"}),
        fix=fix_samples,
        check=check_samples,
    ),
}


def register_evaluation(name: str, evaluation: Evaluation) -> None:
    """Adds an evaluation under a new name.

    Raises:
        UserError: the name is taken.
    """
    if name in EVALUATIONS:
        raise UserError(f"evaluation '{name}' is already registered")
    EVALUATIONS[name] = evaluation


@dataclass(frozen=True)
class Wanted:
    """An evaluation with its options.

    Args:
        name: in EVALUATIONS.
        options: of its class.
        identity: the options' values with contents in the place of names: the same for the same measurement.
    """

    name: str
    options: Any
    identity: dict[str, Any]

    def check(self, task: Any, data: Any) -> None:
        """Raises UserError for a run of this task and data that cannot be measured so."""
        EVALUATIONS[self.name].check(self.options, task, data)

    def file(self, run: RunFolder) -> Path:
        """Where the numbers of a run's newest checkpoint are kept.

        Raises:
            UserError: it has none.
        """
        checkpoint = newest_checkpoint(run.path)
        if checkpoint is None:
            raise UserError(f"run {run.run_id} has no checkpoint yet")
        content = json.dumps([self.identity, checkpoint.name], sort_keys=True)
        return run.path / f"eval-{self.name}-{hashlib.sha256(content.encode()).hexdigest()[:12]}.json"

    def kept(self, run: RunFolder) -> dict[str, float] | None:
        """What was measured before; None when nothing was."""
        found = read_json(self.file(run))
        return dict(found["values"]) if isinstance(found, Mapping) and found.get("format") == FORMAT else None

    def measure(self, run: RunFolder) -> dict[str, float]:
        """Measures a run and keeps the numbers in its folder. Raises UserError."""
        values = EVALUATIONS[self.name].measure(run, self.options)
        write_json(
            self.file(run),
            {"format": FORMAT, "evaluation": self.name, "options": self.identity, "values": values},
        )
        return values


def wanted_evaluation(text: str, runs: str | None = None) -> Wanted:
    """An evaluation from `NAME` or `NAME: {option: value}` (YAML).

    Args:
        runs: where run folders live that options name.

    Raises:
        UserError: another form, an unknown name or option, a missing option or a value that cannot be.
    """
    try:
        found = parse_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(f"--eval '{text}' is no YAML; write NAME or 'NAME: {{option: value}}'") from error
    name, given = (
        next(iter(found.items())) if isinstance(found, Mapping) and len(found) == 1 else (found, None)
    )
    if not isinstance(name, str) or not isinstance(given, Mapping | None):
        raise UserError(
            f"--eval '{text}' is not NAME or 'NAME: {{option: value}}'; names: "
            f"{', '.join(sorted(EVALUATIONS))}"
        )
    return with_options(name, given or {}, runs)


def with_options(name: str, given: Mapping[str, Any], runs: str | None = None) -> Wanted:
    """An evaluation by name, with these options and the defaults of the others. Raises UserError, see
    wanted_evaluation.
    """
    if name not in EVALUATIONS:
        raise UserError(unknown_name("evaluation", name, EVALUATIONS))
    evaluation = EVALUATIONS[name]
    fields = dataclasses.fields(evaluation.options)
    for key in given:
        if key not in [field.name for field in fields]:
            raise UserError(
                unknown_name("option", key, [field.name for field in fields], of=f"evaluation '{name}'")
            )
    for field in fields:
        if (
            field.default is dataclasses.MISSING
            and field.default_factory is dataclasses.MISSING
            and field.name not in given
        ):
            raise UserError(
                f"evaluation '{name}' needs the option {field.name}, for example --eval '{name}: "
                f"{{{field.name}: ...}}'"
            )
    try:
        options = evaluation.options(**given)
        values, contents = evaluation.fix(options, runs)
    except UserError as error:
        raise UserError(f"evaluation '{name}': {error}") from error
    options = dataclasses.replace(options, **values)
    return Wanted(name, options, {**dataclasses.asdict(options), **contents})
