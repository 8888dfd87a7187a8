"""Where a study works: its folder, its data, its runs. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mhla_lightning.compare.child import ChildRun, ChildVerb
from mhla_lightning.compare.plan import Comparison
from mhla_lightning.compare.variants import arguments, identity, merged
from mhla_lightning.config.moved_keys import flat
from mhla_lightning.config.recipes import load_recipe
from mhla_lightning.data.prepare.sources import missing_source
from mhla_lightning.errors import UserError
from mhla_lightning.evaluation import RequestedEvaluation, with_options
from mhla_lightning.evidence.study import Source, Study, Trained
from mhla_lightning.runs.folder import RunFolder, read_object, runs_root

FOLDER = "evidence"
"""Folder of all studies, below that of all runs."""
_NAMED = 8  # hex digits of a folder's name


@dataclass(frozen=True)
class StudyWork:
    """A study on this machine.

    Args:
        study: as read; its seeds are those that are trained.
        folder: holds its runs and what is measured.
        plan: the runs; None for a measurement of speed.
        missing: why data that the study prefers was not taken, one line each.
        source: data of the runs; None where the recipe's own are taken, or none of the study's is here.
    """

    study: Study
    folder: Path
    plan: Comparison | None
    missing: Sequence[str] = ()
    source: Source | None = None

    def needed(self) -> list[ChildRun]:
        """Return the runs that the evaluations need."""
        needs = self.study.trained.needs if self.study.trained else {}
        return [
            ChildRun(
                str(load_recipe(one.recipe).path),
                RunFolder(self.folder / name),
                arguments(one.overrides),
                self.folder / f"{name}.log",
            )
            for name, one in needs.items()
        ]

    def evaluations(self) -> list[RequestedEvaluation]:
        """Return the evaluations; the needed runs that they name are finished.

        Raises:
            UserError: an option is wrong.
        """
        if self.study.trained is None:
            return []
        places = {one.run.run_id: str(one.run.path) for one in self.needed()}
        return [
            with_options(
                name,
                {
                    key: places.get(value, value) if isinstance(value, str) else value
                    for key, value in options.items()
                },
                str(self.folder),
            )
            for name, options in self.study.trained.evaluations.items()
        ]

    def evaluable(self) -> bool:
        """Return whether all runs that the evaluations need are finished."""
        return all(one.run.finished() for one in self.needed())

    def analysis(self, seed: int) -> tuple[Path, ChildVerb]:
        """Return the analysis file of a seed, and the process that writes it."""
        assert self.plan is not None
        assert self.study.trained is not None
        to = self.folder / f"analysis-seed{seed}"
        runs = [str(folder.path) for folder in self._looked_into(seed)]
        options = ["--samples", str(self.study.trained.samples), "--to", str(to)]
        return to / "analysis.json", ChildVerb(
            ["analyze", *runs, *options], self.folder / f"analysis-seed{seed}.log"
        )

    def analyzed(self, seed: int) -> list[dict[str, Any]]:
        """Return the runs in a seed's analysis; empty where it is of other runs or samples."""
        if self.plan is None or self.study.trained is None or not self.study.trained.samples:
            return []
        found = read_object(self.analysis(seed)[0])
        runs = found.get("runs")
        names = [folder.run_id for folder in self._looked_into(seed)]
        if not isinstance(runs, list) or found.get("samples") != self.study.trained.samples:
            return []
        whole = [run for run in runs if isinstance(run, dict)]
        return whole if [run.get("run") for run in whole] == names else []

    def _looked_into(self, seed: int) -> list[RunFolder]:
        """Return the runs of a seed whose attention is analyzed, in the order of the rows."""
        assert self.plan is not None
        assert self.study.trained is not None
        chosen = self.study.trained.analyzed
        return [self.plan.run(row, seed) for row in self.plan.rows if row.name in chosen]

    def speeds(self, repetition: int) -> tuple[Path, ChildVerb]:
        """Return the file of a repetition of a measurement of speed, and the process that writes it."""
        file = self.folder / f"speed-{repetition}.json"
        words = ["bench", "attention"]
        for key, value in (self.study.bench or {}).items():
            values = value if isinstance(value, list) else [value]
            words += [f"--{key.replace('_', '-')}", *map(str, values)]
        return file, ChildVerb([*words, "--json", str(file)], self.folder / f"speed-{repetition}.log")

    def check_data(self) -> None:
        """Raise UserError where none of the study's data is on this machine."""
        if self.study.trained and self.study.trained.sources and self.source is None:
            raise UserError("sources", "; ".join(self.missing))

    def units(self) -> tuple[int, int]:
        """Return how many runs or repetitions are finished, and how many there are."""
        if self.plan is None:
            done = [read_object(self.speeds(seed)[0]) != {} for seed in self.study.seeds]
        else:
            done = [folder.finished() for _, _, folder in self.plan.runs()]
        return sum(done), len(done)

    def complete(self) -> bool:
        """Return whether everything is finished, evaluations and analyses too."""
        done, units = self.units()
        trained = self.study.trained
        if done < units or self.plan is None or trained is None:
            return done == units
        if trained.samples and not all(self.analyzed(seed) for seed in self.study.seeds):
            return False
        if not trained.evaluations:
            return True
        runs = [folder for _, _, folder in self.plan.runs()]
        return self.evaluable() and all(
            one.kept(folder) is not None for one in self.evaluations() for folder in runs
        )

    def minutes_left(self) -> float:
        """Return the modelled minutes of what is not finished."""
        done, units = self.units()
        return 0.0 if self.complete() else self.study.minutes * max(1 - done / units, 1 / units)


def work_for(study: Study, seeds: Sequence[int] | None, runs: str | None) -> StudyWork:
    """Return a study with its folder; nothing is made.

    Args:
        study: to carry out.
        seeds: instead of the study's own; its minutes change in proportion.
        runs: folder of all runs; None means $MHLA_RUNS, else ./runs.
    """
    if seeds is not None:
        minutes = study.minutes * len(seeds) / len(study.seeds)
        study = replace(study, seeds=list(seeds), minutes=minutes)
    root = runs_root(runs) / FOLDER
    if study.trained is None:
        return StudyWork(study, root / f"{study.name}-{_digest(study.bench)}", None)
    source, missing = _source(study.trained)
    common = merged(study.trained.overrides, source.overrides if source else {})
    recipe = load_recipe(study.trained.recipe)
    needs = {name: [one.recipe, one.overrides] for name, one in study.trained.needs.items()}
    rows = list(study.trained.rows)
    # Paths do not count in the identity of a comparison, and other data makes other runs.
    content = {**common, "the source": source.name if source else None, "the needed runs": needs}
    folder = root / f"{study.name}-{identity(flat(recipe.values, filled=False), rows, [], content)}"
    plan = Comparison(recipe, rows, study.seeds, common, folder)
    return StudyWork(study, folder, plan, missing, source)


def _digest(content: object) -> str:
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:_NAMED]


def _source(trained: Trained) -> tuple[Source | None, list[str]]:
    """Return the first data that this machine has, and why earlier ones were not taken."""
    missing: list[str] = []
    for one in trained.sources:
        reason = None if _packed(one.overrides) else missing_source(one.name)
        if reason is None:
            return one, missing
        missing.append(reason)
    return None, missing


def _packed(overrides: Mapping[str, Any]) -> bool:
    return (Path(str(overrides["data.path"])) / "train" / "index.json").is_file()
