"""One process of a run: it joins the recipe, the run folder and Lightning's Trainer."""

from __future__ import annotations

import inspect
import math
import os
import resource
import statistics
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ProgressBar
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from mhla_lightning import __version__
from mhla_lightning.attention import attention_entries
from mhla_lightning.callbacks import (
    EMA,
    Checkpoint,
    EarlyEnd,
    FirstStep,
    Health,
    MixingHeatmaps,
    Monitor,
    Preemption,
    ProgressFile,
    StepBar,
)
from mhla_lightning.callbacks.early_end import STOPPED, early_end
from mhla_lightning.callbacks.preemption import leave_signals_alone
from mhla_lightning.checkpoints.atomic import Keep, sync
from mhla_lightning.checkpoints.io import RunCheckpointIO
from mhla_lightning.checkpoints.source import open_source
from mhla_lightning.config.length import length
from mhla_lightning.config.moved_keys import moved_name
from mhla_lightning.config.recipes import read_run_recipe
from mhla_lightning.config.resolve import Resolved, changed_keys
from mhla_lightning.config.trainer_arguments import seconds_of
from mhla_lightning.data.modules.base import ShardDataModule
from mhla_lightning.data.modules.images import ImageDataModule
from mhla_lightning.data.modules.tokens import TokenDataModule
from mhla_lightning.errors import UserError, inside
from mhla_lightning.evaluation.tags import higher_is_better
from mhla_lightning.inference.loading import keep_tokenizer
from mhla_lightning.runs.classes import keep_classes
from mhla_lightning.runs.disk_errors import disk_errors
from mhla_lightning.runs.folder import (
    FORMAT,
    RunFolder,
    newest_checkpoint,
    read_metrics,
    read_object,
    recipe_hash,
    write_json,
)
from mhla_lightning.runs.logger import RunLogger
from mhla_lightning.runs.stopping import Preempted, StopSignals
from mhla_lightning.strategies.config import is_zero, lightning_precision, strategy_name, zero_config
from mhla_lightning.strategies.ddp import bucket_views
from mhla_lightning.strategies.launcher import RankEnvironment
from mhla_lightning.strategies.sharding import sharding_of
from mhla_lightning.strategies.zero.strategy import ZeroStrategy
from mhla_lightning.tasks import Task
from mhla_lightning.training.memory_errors import MemorySnapshot, is_out_of_memory, out_of_memory
from mhla_lightning.training.step_trace import StepTrace

_GIVE_SHAPES = ("model.backbone", "model.attention", "model.class_path", "model.num_classes")
ON_GPU = ("tokens_per_second_per_gpu", "mfu", "memory_allocated_gib", "memory_reserved_gib")
PACKAGES = ("lightning", "torch", "torchvision", "torchmetrics", "timm", "webdataset", "deepspeed")


class Session:
    """One process of one attempt at a run.

    Args:
        recipe: the resolved recipe; its data is packed.
        run: the run folder.
        resume: the checkpoint folder to resume from; None starts at step 0.
        signals: of this process, which ask it to save and stop; None leaves signals as they are.
        record: writes the recipe into the run folder, once the first step is taken; None writes nothing.
        changed: differences of the recipe to that of `resume`; empty where they agree.

    Raises:
        UserError: data, batch or length that does not fit, a strategy or precision that Lightning refuses, a
            checkpoint of other data or of another model.
    """

    def __init__(
        self,
        recipe: Resolved,
        run: RunFolder,
        resume: Path | None,
        signals: StopSignals | None = None,
        record: Callable[[], None] | None = None,
        changed: str = "",
    ) -> None:
        self.recipe, self.run, self.resume, self.signals = recipe, run, resume, signals
        self.record, self.changed, self._begun = record, changed, False
        self.task, self.data = recipe.task, recipe.data
        self.data.endless = True
        self.max_steps = length(recipe)
        pl.seed_everything(recipe.seed, workers=True, verbose=False)
        self.logger = RunLogger(run, self._resumed_state().get("step", 0), recipe.values)
        self.progress = ProgressFile(run, self.data.state_dict)
        self.memory = MemorySnapshot(run.path)
        self.trainer = self._trainer()
        self.logger.optimizer_steps = lambda: self.trainer.global_step
        self._check()

    def _resumed_state(self) -> dict[str, Any]:
        state = read_object(self.resume / "state.json") if self.resume else {}
        if state and state.get("format") != FORMAT:
            raise UserError(
                str(self.resume),
                f"the checkpoint has format {state.get('format')}, and this version reads format {FORMAT}; "
                "start anew with `fresh`",
            )
        if self.resume and state:
            check_same_data(self.resume, self.data)
            with inside("data"):
                self.data.check_state(state)
            self._check_length(int(state.get("step", 0)))
            check_same_model(self.resume, self.recipe)
        return state

    def _check_length(self, done: int) -> None:
        """Refuse a length that leaves nothing to train.

        A run stopped before its last validation may end.
        """
        if done > self.max_steps or (done == self.max_steps and self.changed):
            raise UserError(
                "data.epochs" if self.data.epochs is not None else "trainer.max_steps",
                f"it makes {self.max_steps} steps, and the run has taken {done}: nothing is left to train "
                "with the changed recipe; set it higher, or take `fresh` or another `run_id`",
            )

    def _trainer(self) -> pl.Trainer:
        arguments = dict(self.recipe.trainer)
        given, loggers = (_listed(arguments.pop(name, [])) for name in ("callbacks", "logger"))
        if isinstance(arguments.get("val_check_interval"), int):
            # Lightning's EarlyStopping takes an interval of 1 for 1.0, the end of an epoch, otherwise.
            arguments["check_val_every_n_epoch"] = None
        arguments |= {
            "max_steps": self.max_steps,
            "max_epochs": -1,
            "min_epochs": 0,  # with `min_steps` Lightning sets 1, and no callback could end the one epoch
            "max_time": None,  # Preemption stops the run
            "num_sanity_val_steps": arguments.get("num_sanity_val_steps", 0),
            "default_root_dir": self.run.path,
            "logger": [self.logger, *loggers],
            "use_distributed_sampler": False,
            "callbacks": self._callbacks(given, arguments),
            "plugins": [*_environment(self.run), RunCheckpointIO()],
        }
        if arguments.get("profiler") == "pytorch":
            arguments["profiler"] = StepTrace()
        check_float16(arguments)
        arguments |= strategy_arguments(arguments)
        try:
            with bucket_views():
                trainer = pl.Trainer(**(_defaults() | arguments))
        except (ValueError, TypeError, RuntimeError, MisconfigurationException) as error:
            raise UserError("trainer", " ".join(str(error).split())) from error
        sharding_of(trainer.strategy)  # refuses a strategy that callbacks cannot read
        leave_signals_alone(trainer)
        if self.recipe.matmul_precision is not None and trainer.strategy.root_device.type == "cuda":
            torch.set_float32_matmul_precision(self.recipe.matmul_precision)
        with inside("data"):
            _, trainer.accumulate_grad_batches = self.data.micro_batch(trainer.world_size)
        if isinstance(trainer.val_check_interval, int):  # a recipe counts optimizer steps, Lightning batches
            trainer.val_check_interval = (
                min(trainer.val_check_interval, self.max_steps) * trainer.accumulate_grad_batches
            )
        return trainer

    def _callbacks(self, given: list[Callback], arguments: dict[str, Any]) -> list[Callback]:
        """Return all callbacks of the run, in the order in which they act after an optimizer step.

        The task has projected its mixing matrices. The step is judged, then weights averaged, then saved.
        Lightning puts checkpoint callbacks last.
        """
        self._averages = [callback for callback in given if isinstance(callback, EMA)]
        health, checkpoint = self.recipe.health, self._checkpoint()
        own: list[Callback] = [
            Monitor(),
            MixingHeatmaps(),
            self.progress,
            checkpoint,
        ]
        if self.signals is not None:
            limit = arguments.get("max_time")
            own.append(
                Preemption(checkpoint, self.signals, float("inf") if limit is None else seconds_of(limit))
            )
        if any(isinstance(callback, ProgressBar) for callback in given):
            pass
        elif not sys.stdout.isatty():  # ProgressFile prints a line a validation instead
            arguments.setdefault("enable_progress_bar", False)
        elif arguments.get("enable_progress_bar", True):
            own.append(StepBar())
        arguments.setdefault("enable_model_summary", False)  # the run command prints size and FLOPs itself
        guard = Health(self.run, health.max_skipped, health.spike_factor)
        return [FirstStep(self._begin), guard, EarlyEnd(), *given, *own, self.memory]

    def _begin(self) -> None:
        """Let the run folder show this attempt, once."""
        if self._begun:
            return
        self._begun = True
        if self.trainer.is_global_zero:
            if self.record is not None:
                self.record()
            if isinstance(self.data, TokenDataModule):
                keep_tokenizer(self.data, self.run.path)
            if isinstance(self.data, ImageDataModule):
                keep_classes(self.run.path, self.data.index().classes)
        self.logger.start()

    def _checkpoint(self) -> Checkpoint:
        save = self.recipe.checkpoint
        keep = Keep(
            save.keep_last,
            save.keep_best,
            save.monitor,
            save.monitor is not None and higher_is_better(save.monitor),
        )
        return Checkpoint(
            self.run,
            self._facts(),
            lambda: {**self.data.state_dict(), "val_hash": self.data.val_hash},
            save.every_n_steps,
            keep,
            self.resume,
            self._averages,
            save.asynchronous,
            self.recipe.to_yaml(),
        )

    def _facts(self) -> dict[str, Any]:
        return {"recipe_hash": recipe_hash(self.recipe.identity()), "versions": versions()}

    def _check(self) -> None:
        world = self.trainer.world_size
        with inside("data"):
            micro, _ = self.data.micro_batch(world)
            if self.trainer.global_rank == 0:
                self.data.check(world)
            facts = self.data.facts()
        with inside("model"):
            self.task.check_data(facts, micro)
            check_split_weights(self.task, self.recipe.trainer.get("strategy"))

    def fit(self) -> None:
        """Train from the newest checkpoint to the end, validate, write summary.json.

        Raises:
            UserError: memory ran out; see also Health, Checkpoint and the data.
            DiskError: the disk is full or fails.
            Preempted: training was stopped before its last step, and everything is saved.
        """
        try:
            with disk_errors(self.run.path):
                self._fit()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            step, world, nodes = self.trainer.global_step, self.trainer.world_size, self.trainer.num_nodes
            shown = self.memory.files
            raise UserError(None, out_of_memory(self.recipe, step, world, nodes, error, shown)) from error

    def _fit(self) -> None:
        checkpoint = None
        if self.resume is not None:
            checkpoint = self.resume / "trainer.ckpt"
            for callback in self._averages:
                callback.resume_from(self.resume)
        with warnings.catch_warnings():
            # The state of the data gives the position in the epoch.
            warnings.filterwarnings(
                "ignore", message="You're resuming from a checkpoint that ended before the epoch"
            )
            if self.signals is not None:
                self.signals.wait_for_step()
            self.trainer.fit(self.task, datamodule=self.data, ckpt_path=checkpoint, weights_only=True)
        if self.signals is not None:
            self.signals.act_at_once()  # all is saved; what is left is a validation
        self._begin()  # where no step was left to take
        unfinished = self.trainer.global_step < self.max_steps
        reason = early_end(self.trainer) if unfinished else None
        if unfinished and reason is None:
            self.progress.write(self.trainer, "preempted", STOPPED)
            raise Preempted(STOPPED)
        if self.progress.validated_at != self.trainer.global_step:
            for average in self._averages:  # outside of training weights are split differently or not at all
                average.start_from(newest_checkpoint(self.run.path))
            self.trainer.validate(self.task, datamodule=self.data, verbose=False)
        if self.trainer.is_global_zero:
            if self.run.metrics.exists():
                sync(self.run.metrics)  # before the summary, which says that all is written
            write_json(self.run.summary, {**self._summary(), "ended_early": reason})
            self.progress.write(self.trainer, "finished", reason)

    def evaluate(self, mode: str, checkpoint: Path) -> dict[str, float]:
        """Evaluate a checkpoint folder; return the metrics by tag.

        Args:
            mode: `validate` or `test`.
            checkpoint: the folder.

        Raises:
            UserError: weights that do not fit the recipe.
        """
        verb = self.trainer.validate if mode == "validate" else self.trainer.test
        with self._looking_at(checkpoint) as arguments:
            verb(self.task, verbose=False, **arguments)
        return {tag: float(value) for tag, value in self.trainer.callback_metrics.items()}

    def predict(self, checkpoint: Path) -> list[dict[str, Any]]:
        """Return the task's predictions, one mapping a batch.

        They are for the test data, or for the validation data where there is none.

        Args:
            checkpoint: the folder.

        Raises:
            UserError: weights that do not fit the recipe, or several processes.
        """
        if self.trainer.world_size > 1:
            raise UserError(
                "trainer.devices", "a prediction takes one process, whose batches are all; write 1"
            )
        with self._looking_at(checkpoint) as arguments:
            return cast(list[dict[str, Any]], self.trainer.predict(self.task, **arguments))

    @contextmanager
    def _looking_at(self, checkpoint: Path) -> Iterator[dict[str, Any]]:
        """Yield the arguments of a verb of the Trainer that reads a checkpoint."""
        for callback in self._averages:
            callback.resume_from(checkpoint)
        self.logger.optimizer_steps = None
        self.trainer.loggers = []  # a look at a finished run changes nothing in its folder
        place = checkpoint / "trainer.ckpt"
        try:
            yield {"datamodule": self.data, "ckpt_path": place, "weights_only": True}
        except RuntimeError as error:
            if "loading state_dict" not in str(error):
                raise
            raise UserError(
                str(checkpoint), f"the weights do not fit this recipe: {' '.join(str(error).split())[:300]}"
            ) from error

    def _summary(self) -> dict[str, Any]:
        series = read_metrics(self.run.metrics)
        speeds = [value for _, value in series.get("train/samples_per_second", [])]
        return {
            "format": FORMAT,
            "run_id": self.run.run_id,
            "last": {tag: values[-1][1] for tag, values in series.items() if tag.startswith("val")},
            "best": {
                tag: best(tag, (value for _, value in values))
                for tag, values in series.items()
                if tag.startswith("val")
            },
            "samples_per_second": statistics.median(speeds) if speeds else None,
            "attention": [] if (backbone := self.task.backbone) is None else attention_entries(backbone),
            "val_samples": self._val_samples(),
            "parameters": self.task.parameter_count,
            "flops_per_sample": self.task.flops_per_sample,
            "peak_memory_bytes": peak_memory_bytes(),
            **_medians(series, ON_GPU),
            "steps": self.trainer.global_step,
            "seconds": round(self.progress.seconds, 3),
        }

    def _val_samples(self) -> int:
        """Return how many samples a validation reads; `limit_val_batches` may leave some out."""
        every = sum(split.samples for split in self.data.splits("val"))
        batches = next(iter(self.trainer.num_val_batches), math.inf)
        return int(min(every, batches * self.data.batch_size))


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _medians(series: Mapping[str, list[tuple[int, float]]], names: Iterable[str]) -> dict[str, float]:
    """Return the medians of the `train/` curves that a run has of these."""
    return {
        name: statistics.median(value for _, value in series[f"train/{name}"])
        for name in names
        if series.get(f"train/{name}")
    }


def strategy_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of Lightning's Trainer that a ZeRO strategy of ours replaces.

    Args:
        arguments: of the recipe's trainer.

    Raises:
        UserError: a strategy that does not work here.
    """
    entry = arguments.get("strategy")
    if not is_zero(entry):
        return {}
    on_cpu, precision = _on_cpu(arguments), arguments.get("precision", "32-true")
    accelerator = "cpu" if on_cpu else arguments.get("accelerator", "auto")
    return {
        "strategy": ZeroStrategy(entry, precision, on_cpu),
        "precision": lightning_precision(precision),
        "accelerator": accelerator,
    }


def check_split_weights(task: Task, strategy: Any) -> None:
    """Refuse what does not go with weights that are split among ranks. Raises UserError.

    Args:
        task: of the recipe.
        strategy: `trainer.strategy`.
    """
    if is_zero(strategy) and zero_config(strategy)["zero_optimization"]["stage"] == 3:
        task.check_gathered(str(strategy_name(strategy)))


def check_device(recipe: Resolved) -> None:
    """Refuse operators that cannot run on the device of the run, before data is made or read.

    Raises:
        UserError: such an operator.
    """
    with inside("model"):
        recipe.task.check_device(torch.device("cpu" if _on_cpu(recipe.trainer) else "cuda"))


def check_float16(arguments: Mapping[str, Any]) -> None:
    """Refuse float16 on a CPU, where Lightning takes bfloat16 instead.

    Args:
        arguments: of the recipe's trainer.

    Raises:
        UserError: see above.
    """
    precision = str(arguments.get("precision", "32-true"))
    if precision.startswith("16") and _on_cpu(arguments):
        raise UserError(
            "trainer.precision",
            f"{precision} needs a GPU: a CPU has no float16; take bf16-mixed, bf16-true or 32-true",
        )


def _on_cpu(arguments: Mapping[str, Any]) -> bool:
    """Whether the arguments of a trainer choose a CPU here."""
    accelerator = arguments.get("accelerator", "auto")
    return not torch.cuda.is_available() if accelerator == "auto" else accelerator == "cpu"


def _defaults() -> dict[str, Any]:
    """The default of every argument of Lightning's Trainer.

    Arguments that are passed are not taken from the environment (PL_TRAINER_LIMIT_TRAIN_BATCHES and so on),
    where no recipe shows them.
    """
    return {name: argument.default for name, argument in inspect.signature(pl.Trainer).parameters.items()}


def check_same_data(checkpoint: Path, data: ShardDataModule) -> None:
    """Refuse to mix the data of two data sets in one run.

    Raises:
        UserError: the checkpoint was trained on other data.
    """
    state = read_object(checkpoint / "state.json")
    seen = state.get("data_hash")
    if state and seen != data.data_hash:
        raise UserError(
            str(checkpoint.parent.parent),
            f"the run was trained on data {str(seen)[:12]}, and {data.path} is {data.data_hash[:12]}; take "
            "`fresh`, another `run_id`, or the old data",
        )


def check_same_model(checkpoint: Path, recipe: Resolved) -> None:
    """Refuse to resume a model of other tensors.

    Raises:
        UserError: names or shapes differ; the key is the recipe's key that has changed.
    """
    outline = open_source(checkpoint / "trainer.ckpt").weights().within("backbone.").outline
    saved = {name: tuple(tensor.shape) for name, tensor in outline.items()}
    own = recipe.task.shapes()
    if saved == own:
        return
    both = saved.keys() & own.keys()
    other = sorted(name for name in both if saved[name] != own[name])
    example = f" ({other[0]} {saved[other[0]]} -> {own[other[0]]})" if other else ""
    before = checkpoint / "recipe.yaml"
    changed = changed_keys(read_run_recipe(RunFolder(checkpoint.parent.parent), before), recipe.values)
    keys = [key.replace(".init_args.", ".") for key in changed]
    keys = [moved_name(key, recipe.values) for key in keys if key.startswith(_GIVE_SHAPES)]
    raise UserError(
        keys[0] if keys else str(checkpoint),
        f"it makes another model than {checkpoint.name} of the run holds: {len(own.keys() - both)} tensors "
        f"new, {len(saved.keys() - both)} left over, {len(other)} of another shape{example}; set it back, or "
        "start a run with `fresh` or another `run_id`, from these weights by `model.init_from`",
    )


def best(tag: str, values: Iterable[float]) -> float:
    """Return the best value of a tag: the highest accuracy, the lowest of everything else."""
    return max(values) if higher_is_better(tag) else min(values)


def versions() -> dict[str, str]:
    """Return the versions of this package, of Python and of the libraries below."""
    return {
        "mhla_lightning": __version__,
        "python": sys.version.split()[0],
        **{name: version(name) for name in PACKAGES},
    }


def peak_memory_bytes() -> int:
    """Return the peak of the GPU's allocated memory, else of the resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _environment(run: RunFolder) -> list[Any]:
    """The cluster environment, where it is not torchrun's.

    Lightning takes every process inside a SLURM allocation for an srun task; only one in a job step is one.
    Preemption is handled by our callback, so Lightning must not queue the job again.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return []
    in_step = "SLURM_STEP_ID" in os.environ and "SLURM_PROCID" in os.environ
    return [SLURMEnvironment(auto_requeue=False) if in_step else RankEnvironment(run.path)]
