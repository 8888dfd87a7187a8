"""Carry out a study: its runs, evaluations and analyses; finished work is reused."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from mhla_lightning.compare.child import AnyChild, Child, ChildRun, ChildVerb, train_in_children
from mhla_lightning.compare.plan import check_rows, finished_line, log_end, make_folder, measure_run
from mhla_lightning.errors import UserError
from mhla_lightning.evidence.machine import StudyStart, started
from mhla_lightning.evidence.work import StudyWork
from mhla_lightning.runs.folder import RunFolder, read_object
from mhla_lightning.runs.lock import hold, is_held

_STOPPED = (75, 130, 143)  # exit codes of a run that a signal or a full disk has stopped
_THREADS = 1  # of a run: equal on every machine
_WAIT = 1.0  # seconds between two looks at a run of an earlier start


@dataclass
class Reporter:
    """What a study says while it works.

    Args:
        say: a line about what has ended.
        fail: lines about a failure.
        progress: name of the work, and the share of the study's runs that is done; None after the runs.
    """

    say: Callable[[str], None]
    fail: Callable[[Sequence[str]], None]
    progress: Callable[[str, float | None], None]


@dataclass
class Outcome:
    """How a study ended.

    Attributes:
        failures: one line each.
        stopped: exit code of what a signal or a full disk has stopped; 0 where nothing was.
    """

    failures: list[str] = field(default_factory=list)
    stopped: int = 0


class _Runner:
    """One start of a study."""

    def __init__(self, work: StudyWork, jobs: int, reporter: Reporter, begun: StudyStart) -> None:
        self.work, self.jobs, self.reporter, self.begun = work, jobs, reporter, begun
        self.outcome = Outcome()
        self.threads: int | None = _THREADS

    def run(self) -> Outcome:
        """Do what is not done; the next part begins where the one before has not been stopped."""
        parts = (self.needed, self.train, self.evaluate, self.analyze)
        for part in (self.measure,) if self.work.plan is None else parts:
            if not self.outcome.stopped:
                part()
        return self.outcome

    def needed(self) -> None:
        """Train the runs that evaluations need."""
        self._wait([one.run for one in self.work.needed()])
        waiting = [one for one in self.work.needed() if not one.run.finished()]
        self._carry_out(waiting, lambda one: one.run.run_id, lambda one: one.run.finished())
        if self.work.evaluable() and self.work.plan is not None:
            check_rows(replace(self.work.plan, evaluations=self.work.evaluations()))

    def train(self) -> None:
        """Train all rows, seed by seed: an interrupted study has whole seeds."""
        plan = self.work.plan
        assert plan is not None
        runs = plan.runs(seed_by_seed=True)
        self._wait([folder for _, _, folder in runs])
        names = {folder.path: (row, seed) for row, seed, folder in runs}
        for row, seed, folder in runs:
            if folder.finished():
                self.reporter.say(finished_line(row, seed, folder, True))
        waiting = [plan.child(row, seed) for row, seed, folder in runs if not folder.finished()]

        def title(child: ChildRun) -> str:
            row, seed = names[child.run.path]
            return f"row '{row.name}', seed {seed}"

        def ended(child: ChildRun) -> bool:
            if not child.run.finished():
                return False
            self.reporter.say(finished_line(*names[child.run.path], child.run, False))
            return True

        before = len(runs) - len(waiting)
        self._carry_out(waiting, title, ended, lambda done: (before + done) / len(runs))

    def evaluate(self) -> None:
        """Measure every finished run."""
        plan = self.work.plan
        assert plan is not None
        if not self.work.evaluable():
            return
        for wanted in self.work.evaluations():
            for row, seed, folder in plan.runs(seed_by_seed=True):
                if not folder.finished():
                    continue
                self.reporter.progress(f"{wanted.name} of {row.name}, seed {seed}", None)
                try:
                    found, kept = measure_run(plan, wanted, row, seed)
                except UserError as error:
                    self._fail(f"{wanted.name}: {error}", [])
                    continue
                shown = ", ".join(f"{number} {value:.4g}" for number, value in found.items())
                before = " (measured before)" if kept else ""
                self.reporter.say(f"{row.name}, seed {seed}: {wanted.name}: {shown}{before}")
                self.begun.write()

    def analyze(self) -> None:
        """Look into the attention of all runs of each seed whose rows are all finished."""
        trained, plan = self.work.study.trained, self.work.plan
        assert trained is not None
        assert plan is not None
        if not trained.samples:
            return
        whole = [seed for seed in plan.seeds if all(plan.run(row, seed).finished() for row in plan.rows)]
        waiting = {self.work.analysis(seed)[1].log: seed for seed in whole if not self.work.analyzed(seed)}
        self._carry_out(
            [self.work.analysis(seed)[1] for seed in waiting.values()],
            lambda child: f"the analysis of seed {waiting[child.log]}",
            lambda child: bool(self.work.analyzed(waiting[child.log])),
        )

    def measure(self) -> None:
        """Measure speed, one repetition after the other: two at once would disturb each other."""
        files = {self.work.speeds(seed)[1].log: self.work.speeds(seed)[0] for seed in self.work.study.seeds}
        every = [self.work.speeds(seed)[1] for seed in self.work.study.seeds]
        waiting = [child for child in every if not read_object(files[child.log])]
        before, self.jobs, self.threads = len(every) - len(waiting), 1, None

        def ended(child: ChildVerb) -> bool:
            self.reporter.say(f"{child.log.stem} measured")
            return bool(read_object(files[child.log]))

        self._carry_out(
            waiting, lambda child: child.log.stem, ended, lambda done: (before + done) / len(every)
        )

    def _carry_out(
        self,
        children: Sequence[AnyChild],
        title: Callable[[AnyChild], str],
        finished: Callable[[AnyChild], bool],
        share: Callable[[float], float | None] = lambda done: None,
    ) -> None:
        def ended(child: AnyChild, code: int) -> None:
            self.begun.write()
            if code in _STOPPED:
                self.outcome.stopped = self.outcome.stopped or code
            if (code != 0 or not finished(child)) and not self.outcome.stopped:
                self._fail(
                    f"{title(child)} stopped with exit code {code}; all it said is in {child.log}",
                    log_end(child.log),
                )

        if children:
            train_in_children(
                children,
                self.jobs,
                lambda done: self.reporter.progress(_kind(children[0]), share(done)),
                ended,
                keep_going=True,
                threads=self.threads,
            )

    def _fail(self, line: str, log: Sequence[str]) -> None:
        self.outcome.failures.append(line)
        self.reporter.fail([*log, f"error: {line}"])

    def _wait(self, runs: Sequence[RunFolder]) -> None:
        """Wait for runs that children of a killed start still train."""
        held = [run for run in runs if is_held(run.path)]
        if held:
            names = ", ".join(run.run_id for run in held)
            self.reporter.say(f"waiting for {names}: an earlier start was killed, and they still train")
        while any(is_held(run.path) for run in held):
            time.sleep(_WAIT)


def _kind(child: Child) -> str:
    return next(iter(child.words()))


def carry_out(work: StudyWork, jobs: int, reporter: Reporter) -> Outcome:
    """Do what a study has not done yet.

    Args:
        work: the study.
        jobs: processes at once, of one thread each; speed is measured alone, on all cores.
        reporter: is told what happens.

    Raises:
        UserError: a row or an evaluation is wrong, or the data is missing; another process holds the folder.
        KeyboardInterrupt: the user's, once the children have ended.
    """
    if work.complete():
        return Outcome()
    work.check_data()
    if work.plan is not None:
        check_rows(work.plan)
    make_folder(work.folder)
    with hold(work.folder), started(work.folder, jobs) as begun:
        return _Runner(work, jobs, reporter, begun).run()
