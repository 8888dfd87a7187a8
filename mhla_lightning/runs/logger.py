"""The logger of a run: TensorBoard, and the file metrics.jsonl that other verbs read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import yaml
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard.summary import hparams

from mhla_lightning.runs.folder import RunFolder, read_lines, write_text
from mhla_lightning.runs.tags import layout

_HPARAMS = (
    "model.",
    "data.batch_size",
    "trainer.max_steps",
    "trainer.precision",
    "trainer.strategy",
    "seed_",
)
"""Keys of a recipe that TensorBoard's table of hyperparameters shows."""


class HeldExperiment:
    """Keeps the calls of TensorBoard's writer until there is one.

    Attributes:
        calls: names of methods, with their arguments.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: self.calls.append((name, args, kwargs))


class RunLogger(TensorBoardLogger):
    """Lightning's TensorBoardLogger, which also writes every scalar as a line of metrics.jsonl.

    Lightning's own writes event files only, which need TensorBoard to be read. The event files begin with
    the recipe as text and the layout of the first screen. They end with the hyperparameters, beside which
    TensorBoard shows the last numbers of validation.

    Args:
        run: the run folder.
        resume_step: step of the checkpoint that training resumes from; later lines and points of an earlier
            attempt are dropped.
        recipe: the resolved recipe; empty writes neither its text nor hyperparameters.

    Attributes:
        optimizer_steps: returns the x axis, optimizer steps done; set once the trainer is built.
    """

    def __init__(self, run: RunFolder, resume_step: int = 0, recipe: Mapping[str, Any] | None = None) -> None:
        super().__init__(
            save_dir=run.tensorboard,
            name="",
            version="",
            default_hp_metric=False,
            purge_step=resume_step + 1 if resume_step else None,
        )
        self._file = run.metrics
        self._resume_step = resume_step
        self._started = False
        self._early: list[tuple[Mapping[str, float], int | None]] = []
        self._held = HeldExperiment()
        self._tags = set[str]()
        self._recipe, self._validated = dict(recipe or {}), dict[str, float]()
        self.optimizer_steps: Callable[[], int] | None = None

    @rank_zero_only
    def start(self) -> None:
        """Drop the lines that an earlier attempt logged after the checkpoint (`resume_step`).

        Nothing is written before: an attempt that fails at its start leaves the folder as it was.
        """
        if self._started:
            return
        self._started = True
        keep_until(self._file, self._resume_step)
        if self._recipe:
            self.experiment.add_text("recipe", as_markdown(self._recipe))
        for metrics, step in self._early:
            self._write(metrics, step)
        for name, args, kwargs in self._held.calls:
            getattr(self.experiment, name)(*args, **kwargs)

    @property
    def experiment(self) -> Any:
        """TensorBoard's writer; until the run has started, a stand-in that keeps its calls.

        Lightning asks for it before anything is checked, and the writer makes a file at once.
        """
        # the rank is an attribute that Lightning sets on the function
        held = not self._started and cast(Any, rank_zero_only).rank == 0
        return self._held if held else super().experiment

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        # Training is one endless epoch, so Lightning's number of it is always 0.
        metrics = {tag: value for tag, value in metrics.items() if tag != "epoch"}
        if self.optimizer_steps is not None:  # Lightning counts one less in validation than in training
            step = self.optimizer_steps()
        if self._started:
            self._write(metrics, step)
        else:
            self._early.append((metrics, step))

    @rank_zero_only
    def save(self) -> None:
        """Write what TensorBoard holds back, once the run has started."""
        if self._started:
            super().save()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the event file, if there is one."""
        if not self._started:
            return
        try:
            if status == "success":
                self._end()
            super().finalize(status)
        except OSError:  # a full disk
            if status == "success":
                raise  # after a failure its own error is on its way

    def _lay_out(self, tags: Iterable[str]) -> None:
        """Write the first screen at the first point of training, and again of validation."""
        known, new = (
            {tag.partition("/")[0] for tag in some} & {"train", "val"} for some in (self._tags, tags)
        )
        self._tags |= set(tags)
        if not new <= known:
            self.experiment.add_custom_scalars(layout(self._tags))

    def _end(self) -> None:
        """Write the hyperparameters, once there are numbers to show beside them."""
        if not self._recipe or not self._validated:
            return
        for summary in hparams(hyperparameters(self._recipe), self._validated):
            self.experiment.file_writer.add_summary(summary)
        self._recipe = {}

    def _write(self, metrics: Mapping[str, float], step: int | None) -> None:
        super().log_metrics(metrics, step)
        self._lay_out(metrics)
        self._validated |= {tag: float(value) for tag, value in metrics.items() if tag.startswith("val")}
        with self._file.open("a", encoding="utf-8") as file:
            file.writelines(
                json.dumps({"step": step, "tag": tag, "value": float(value)}) + "\n"
                for tag, value in metrics.items()
            )


def as_markdown(recipe: Mapping[str, Any]) -> str:
    """Return a recipe as a block of code in Markdown: YAML without keys that have no value."""
    text = yaml.safe_dump(_known(recipe), sort_keys=False)
    return "".join(f"    {line}\n" for line in text.splitlines())


def _known(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {key: _known(item) for key, item in value.items() if item is not None}


def hyperparameters(recipe: Mapping[str, Any]) -> dict[str, bool | float | str]:
    """Return the options of a recipe for TensorBoard's table, named as on the command line.

    >>> hyperparameters({"model": {"init_args": {"optimizer": {"lr": 0.1}}}, "data": {"path": "digits"}})
    {'model.optimizer.lr': 0.1}
    """
    found: dict[str, bool | float | str] = {}
    waiting: list[tuple[str, Any]] = [("", dict(recipe))]
    while waiting:
        name, value = waiting.pop(0)
        if isinstance(value, Mapping):
            waiting += [
                (name if key == "init_args" else f"{name}.{key}".lstrip("."), item)
                for key, item in value.items()
            ]
        elif value is not None and name.startswith(_HPARAMS):
            found[name] = (
                value if isinstance(value, bool | int | float | str) else json.dumps(value, default=str)
            )
    return found


def keep_until(metrics: Path, step: int) -> None:
    """Keep the lines of metrics.jsonl up to a step; a last line that a kill has cut goes, too.

    Args:
        metrics: the file.
        step: optimizer steps done.
    """
    if not metrics.is_file():
        return
    kept = [row for row in read_lines(metrics) if isinstance(row.get("step"), int) and row["step"] <= step]
    write_text(metrics, "".join(json.dumps(row) + "\n" for row in kept))
