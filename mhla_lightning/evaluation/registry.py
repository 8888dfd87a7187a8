"""The table of evaluations that `mhla compare --eval` runs on finished runs.

Importing this module imports no torch.
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
from mhla_lightning.errors import UserError, inside, unknown_name
from mhla_lightning.evaluation.clip import ClipScoreOptions, check_clip, fix_clip, measure_clip
from mhla_lightning.evaluation.sample_options import SampleOptions
from mhla_lightning.evaluation.samples import AGREEMENTS, check_samples, fix_samples, measure_samples
from mhla_lightning.runs.folder import FORMAT, RunFolder, newest_checkpoint, read_object, write_json


@dataclass(frozen=True)
class Evaluation:
    """One entry of the table, chosen by `--eval NAME`.

    Attributes:
        options: a frozen dataclass whose fields are the options; it raises UserError for invalid values.
        measure: (run folder, options) -> numbers.
        higher: names of numbers that are best high; all others are best low.
        fix: (options, runs) -> (values that replace options, values that identify them in stored results).
            Names of other runs become folders, and then the contents of these. `runs` is the folder of all
            run folders; None means $MHLA_RUNS, else ./runs.
        check: (options, task, data), called before training; raises UserError for a run it cannot measure.
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
        higher=frozenset({*AGREEMENTS, "class_score", "precision", "recall", "images_per_second"}),
        fix=fix_samples,
        check=check_samples,
    ),
    "clip": Evaluation(
        options=ClipScoreOptions,
        measure=measure_clip,
        higher=frozenset({"clip_score"}),
        fix=fix_clip,
        check=check_clip,
    ),
}


def register_evaluation(name: str, evaluation: Evaluation) -> None:
    """Add an evaluation under a new name.

    Raises:
        UserError: the name is taken.
    """
    if name in EVALUATIONS:
        raise UserError("name", f"evaluation '{name}' is already registered")
    EVALUATIONS[name] = evaluation


@dataclass(frozen=True)
class RequestedEvaluation:
    """An evaluation with its options.

    Args:
        name: in EVALUATIONS.
        options: of its class.
        identity: values of the options, with contents in the place of names; equal for equal measurements.
    """

    name: str
    options: Any
    identity: dict[str, Any]

    def check(self, task: Any, data: Any) -> None:
        """Check that a run of this task and data can be measured.

        Raises:
            UserError: it cannot.
        """
        EVALUATIONS[self.name].check(self.options, task, data)

    def file(self, run: RunFolder) -> Path:
        """Return the file of the numbers of a run's newest checkpoint.

        Raises:
            UserError: the run has no checkpoint.
        """
        checkpoint = newest_checkpoint(run.path)
        if checkpoint is None:
            raise UserError(run.run_id, "has no checkpoint yet")
        content = json.dumps([self.identity, checkpoint.name], sort_keys=True)
        return run.path / f"eval-{self.name}-{hashlib.sha256(content.encode()).hexdigest()[:12]}.json"

    def kept(self, run: RunFolder) -> dict[str, float] | None:
        """Return the numbers of an earlier measurement; None if there is none."""
        found = read_object(self.file(run))
        values = found.get("values")
        return dict(values) if found.get("format") == FORMAT and isinstance(values, Mapping) else None

    def measure(self, run: RunFolder) -> dict[str, float]:
        """Measure a run and store the numbers in its folder.

        Raises:
            UserError: the run cannot be measured.
        """
        values = EVALUATIONS[self.name].measure(run, self.options)
        write_json(
            self.file(run),
            {"format": FORMAT, "evaluation": self.name, "options": self.identity, "values": values},
        )
        return values


def requested_evaluation(text: str, runs: str | None = None) -> RequestedEvaluation:
    """Parse an evaluation from `NAME` or `NAME: {option: value}` (YAML).

    Args:
        text: the name and the options.
        runs: folder of all run folders, for options that name runs.

    Raises:
        UserError: another form, an unknown name or option, a missing option, or an invalid value.
    """
    try:
        found = parse_yaml(text)
    except yaml.YAMLError as error:
        raise UserError("eval", f"'{text}' is no YAML; write NAME or 'NAME: {{option: value}}'") from error
    name, given = (
        next(iter(found.items())) if isinstance(found, Mapping) and len(found) == 1 else (found, None)
    )
    if not isinstance(name, str) or not isinstance(given, Mapping | None):
        raise UserError(
            "eval",
            f"'{text}' is not NAME or 'NAME: {{option: value}}'; names: {', '.join(sorted(EVALUATIONS))}",
        )
    if name not in EVALUATIONS:
        raise UserError("eval", unknown_name("evaluation", name, EVALUATIONS))
    with inside(f"eval.{name}"):
        return with_options(name, given or {}, runs)


def with_options(name: str, given: Mapping[str, Any], runs: str | None = None) -> RequestedEvaluation:
    """Return an evaluation with the given options and the defaults of the others.

    Args:
        name: in EVALUATIONS.
        given: options by name.
        runs: folder of all run folders, for options that name runs.

    Raises:
        UserError: an unknown or missing option, or an invalid value; the key is the option.
    """
    evaluation = EVALUATIONS[name]
    fields = dataclasses.fields(evaluation.options)
    names = [field.name for field in fields]
    for key in given:
        if key not in names:
            raise UserError(str(key), unknown_name("option", key, names, of=f"evaluation '{name}'"))
    for field in fields:
        if (
            field.default is dataclasses.MISSING
            and field.default_factory is dataclasses.MISSING
            and field.name not in given
        ):
            raise UserError(
                field.name, f"evaluation '{name}' needs this option: '{name}: {{{field.name}: ...}}'"
            )
    options = evaluation.options(**given)
    values, contents = evaluation.fix(options, runs)
    options = dataclasses.replace(options, **values)
    return RequestedEvaluation(name, options, {**dataclasses.asdict(options), **contents})
