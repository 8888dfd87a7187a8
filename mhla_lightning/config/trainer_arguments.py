"""The treatment of each argument of Lightning's Trainer and of each of its callbacks.

One table: the checks of recipes read it, and docs/trainer-arguments.md shows it. Imports no torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

from mhla_lightning.errors import UserError

Handling = Literal["works", "refused", "ours"]


@dataclass(frozen=True)
class Rule:
    """What a run does with an argument or a callback.

    Args:
        handling: `works`; `refused`; `ours`: the run command sets it, and a recipe cannot.
        note: what it does, or why it cannot be set and what to take instead.
        unset: values that change nothing, beside null: Lightning's default, which recipe.yaml shows.
        accepts: whether a value is allowed; None leaves that to the types of Lightning's arguments.
        allowed: the values that `accepts` takes, in words.
    """

    handling: Handling
    note: str
    unset: tuple[Any, ...] = ()
    accepts: Callable[[Any], bool] | None = None
    allowed: str = ""

    def is_unset(self, value: Any) -> bool:
        """Whether a value changes nothing; 1 is one batch, and 1.0 is all of them."""
        return value is None or any(type(value) is type(one) and value == one for one in self.unset)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


def _whole(least: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and value >= least


def _is_limit(value: Any) -> bool:
    """Whether a value is a number of batches or a share of them."""
    return _is_number(value) and (value >= 0 if isinstance(value, int) else value <= 1 and value >= 0)


def _is_class(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("class_path"), str)


def _one_of(*values: Any) -> Callable[[Any], bool]:
    return lambda value: any(type(value) is type(one) and value == one for one in values)


_WHOLE_STEPS = "it counts optimizer steps: a whole number from 1"
_PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "16-mixed", "16-true", "64-true")
_SHORT_PRECISIONS = ("32", "bf16", "16", "64", 32, 16, 64)  # Lightning's own short forms
_ENDLESS = "the training data is one endless epoch"

ARGUMENTS: dict[str, Rule] = {
    "accelerator": Rule("works", "`auto` takes a GPU where there is one"),
    "strategy": Rule("works", "DDP and the ZeRO presets; see [Strategies](strategies.md)"),
    "devices": Rule("works", "processes on each machine; the global batch stays `data.batch_size`"),
    "num_nodes": Rule("works", "machines; `mhla submit` sets it"),
    "precision": Rule(
        "works",
        "float16 needs a GPU: on a CPU it is refused and never becomes bfloat16; `16-true` without DeepSpeed "
        "needs an `optimizer.eps` that float16 holds, such as 1e-4",
        accepts=_one_of(*_PRECISIONS, *_SHORT_PRECISIONS),
        allowed=f"take one of {', '.join(_PRECISIONS)}",
    ),
    "logger": Rule(
        "works",
        "further loggers by class path, a mapping or a list of them, beside the run's own TensorBoard and "
        "metrics.jsonl; see [Loggers](#loggers)",
        accepts=lambda value: _is_class(value) or (isinstance(value, list) and all(map(_is_class, value))),
        allowed="the run's own logger is always there; name further ones as a list, such as "
        "[{class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: logs}}]",
    ),
    "callbacks": Rule("works", "ours, your own, and Lightning's as listed below"),
    "fast_dev_run": Rule(
        "refused",
        "it would leave a run that looks finished; for a smoke test take `trainer.max_steps` 1, "
        "`trainer.limit_val_batches` 1 and a `run_id` of its own",
        unset=(False, 0),
    ),
    "max_epochs": Rule("ours", "`trainer.max_steps` or `data.epochs` gives the length", unset=(-1,)),
    "min_epochs": Rule("ours", f"{_ENDLESS}; take `trainer.min_steps`", unset=(0,)),
    "max_steps": Rule(
        "works",
        "the length of the run in optimizer steps; -1 leaves it to `data.epochs`",
        accepts=lambda value: type(value) is int and (value == -1 or value >= 1),
        allowed=_WHOLE_STEPS,
    ),
    "min_steps": Rule(
        "works",
        "`EarlyStopping` and `trainer.should_stop` end no run before this optimizer step",
        accepts=_whole(0),
        allowed="it counts optimizer steps: a whole number from 0",
    ),
    "max_time": Rule(
        "works",
        "the time of one start; then the run saves, stops with exit code 75, and the same command resumes it",
    ),
    "limit_train_batches": Rule(
        "refused",
        "Lightning would begin the same samples anew after them; take `trainer.max_steps` for a shorter run, "
        "or a smaller data set",
        unset=(1.0,),
    ),
    "limit_val_batches": Rule(
        "works",
        "batches of a validation on each rank, or a share of them; 0 does not validate; not beside "
        "`model.eval_sizes`",
        accepts=_is_limit,
        allowed="it is a whole number of batches, or a share from 0.0 to 1.0",
    ),
    "limit_test_batches": Rule(
        "works",
        "the same for `mode` test",
        accepts=_is_limit,
        allowed="it is a whole number of batches, or a share from 0.0 to 1.0",
    ),
    "limit_predict_batches": Rule("refused", "a run predicts nothing", unset=(1.0,)),
    "overfit_batches": Rule(
        "refused",
        "it needs a sampler, which a stream of shards does not have; pack the few samples into a data set of "
        "their own and name it in `data.path`",
        unset=(0, 0.0),
    ),
    "val_check_interval": Rule(
        "works",
        "optimizer steps between two validations; above `trainer.max_steps` there is one, at the end",
        accepts=_whole(1),
        allowed=_WHOLE_STEPS,
    ),
    "check_val_every_n_epoch": Rule(
        "ours",
        f"{_ENDLESS}; take `trainer.val_check_interval`, in optimizer steps",
        unset=(1,),
    ),
    "num_sanity_val_steps": Rule(
        "works",
        "validation batches before training; 0 here, -1 takes all; it changes no number of the run",
        accepts=_whole(-1),
        allowed="it counts batches: a whole number from -1, which takes all",
    ),
    "log_every_n_steps": Rule(
        "works",
        "optimizer steps between two points of the `train/` curves; 0 draws none",
        accepts=_whole(0),
        allowed="it counts optimizer steps: a whole number from 1, or 0 for no curves",
    ),
    "enable_checkpointing": Rule(
        "ours", "the run command saves checkpoints (`checkpoint.every_n_steps`)", unset=(True,)
    ),
    "enable_progress_bar": Rule("works", "shown on a terminal by default"),
    "enable_model_summary": Rule("works", "off by default: the run command prints parameters and FLOPs"),
    "accumulate_grad_batches": Rule(
        "ours", "it follows from `data.batch_size` and `data.micro_batch_size`", unset=(1,)
    ),
    "gradient_clip_val": Rule(
        "works",
        "the largest gradient norm or value; 0 does not clip",
        accepts=lambda value: _is_number(value) and value >= 0,
        allowed="it is a number from 0",
    ),
    "gradient_clip_algorithm": Rule(
        "works",
        "`norm` or `value`; ZeRO clips by norm only",
        accepts=_one_of("norm", "value"),
        allowed="take norm or value",
    ),
    "deterministic": Rule("works", "as in Lightning"),
    "benchmark": Rule("works", "as in Lightning"),
    "inference_mode": Rule("works", "as in Lightning"),
    "use_distributed_sampler": Rule("works", "it has no effect: the data module splits the shards"),
    "profiler": Rule(
        "works", "pytorch traces a few steps into the run's `tensorboard/`; also simple, advanced or a class"
    ),
    "detect_anomaly": Rule(
        "works", "a gradient that is not finite ends the run instead of leaving out the step"
    ),
    "barebones": Rule(
        "refused",
        "it switches off the logger and the checkpoints of a run; `mhla bench step` measures what they cost",
        unset=(False,),
    ),
    "plugins": Rule(
        "refused",
        "precision, checkpoint files and the cluster are set by the run; take `trainer.precision`, or build "
        "an `L.Trainer` in Python",
        unset=([],),
    ),
    "sync_batchnorm": Rule(
        "works", "as in Lightning; of the packaged backbones VLT and `convnet_tiny` have batch norm"
    ),
    "reload_dataloaders_every_n_epochs": Rule("ours", "training is one endless epoch", unset=(0,)),
    "default_root_dir": Rule("ours", "the files of a run go into its run folder"),
    "enable_autolog_hparams": Rule("works", "as in Lightning; recipe.yaml holds everything in any case"),
    "model_registry": Rule("refused", "the run command uploads nothing; take `mhla export`"),
}
"""The arguments of Lightning's Trainer, in its order."""

ADDED: dict[str, Rule] = {
    "matmul_precision": Rule(
        "works",
        "not Lightning's: float32 matrix products on a GPU; `high` takes TF32 and is several times faster, "
        "null leaves torch's `highest`",
        accepts=_one_of("highest", "high", "medium"),
        allowed="take highest, high or medium",
    ),
}
"""Arguments of a recipe's trainer that Lightning's Trainer does not have."""

_AVERAGE = "take `mhla_lightning.callbacks.EMA`, which works under every strategy"
_SAVES = "the run saves by itself: take `checkpoint.every_n_steps`, `keep_best` and `monitor`"

CALLBACKS: dict[str, Rule] = {
    "BackboneFinetuning": Rule("refused", f"it unfreezes by epochs, and {_ENDLESS}; take `model.train_only`"),
    "BaseFinetuning": Rule("refused", f"it unfreezes by epochs, and {_ENDLESS}; take `model.train_only`"),
    "BasePredictionWriter": Rule("refused", "a run predicts nothing"),
    "BatchSizeFinder": Rule(
        "refused",
        "it would change the batch of a step; find `data.micro_batch_size` with `mhla plan`: it changes no "
        "result",
    ),
    "Callback": Rule("works", "your own callbacks; one that sets `trainer.should_stop` stops with code 75"),
    "Checkpoint": Rule("works", "a base class of your own callbacks; it acts last"),
    "DeviceStatsMonitor": Rule("works", "as in Lightning"),
    "EarlyStopping": Rule(
        "works",
        "it looks at every validation and ends the run: it is finished, and summary.json says why; a metric "
        "that is not finite ends it with exit code 2",
    ),
    "EMAWeightAveraging": Rule("refused", _AVERAGE),
    "GradientAccumulationScheduler": Rule(
        "refused", "accumulation follows from `data.batch_size` and `data.micro_batch_size`"
    ),
    "LambdaCallback": Rule("works", "in Python only: a recipe holds no functions"),
    "LearningRateFinder": Rule("refused", "set `model.optimizer.lr`; `mhla compare --over` tries several"),
    "LearningRateMonitor": Rule("works", "as in Lightning; `train/lr` is logged in any case"),
    "ModelCheckpoint": Rule("refused", _SAVES),
    "ModelPruning": Rule("refused", f"it prunes at the end of epochs, and {_ENDLESS}"),
    "ModelSummary": Rule("works", "as in Lightning"),
    "OnExceptionCheckpoint": Rule("refused", _SAVES),
    "ProgressBar": Rule("works", "as in Lightning"),
    "RichModelSummary": Rule("works", "as in Lightning"),
    "RichProgressBar": Rule("works", "as in Lightning"),
    "SpikeDetection": Rule("refused", "take `health.spike_factor`"),
    "StochasticWeightAveraging": Rule("refused", f"it averages by epochs, and {_ENDLESS}; {_AVERAGE}"),
    "TQDMProgressBar": Rule("works", "as in Lightning"),
    "ThroughputMonitor": Rule("refused", "`train/samples_per_second` and `tokens_per_second` are logged"),
    "Timer": Rule("refused", "take `trainer.max_time`"),
    "WeightAveraging": Rule("refused", _AVERAGE),
}
"""The callbacks of Lightning; a class derived from one has its rule."""

_LIGHTNING = ("lightning.", "pytorch_lightning.")


def check_arguments(trainer: Mapping[str, Any]) -> None:
    """Refuse arguments that a run cannot keep, before anything is built.

    Args:
        trainer: the section of a recipe.

    Raises:
        UserError: the first such argument or callback.
    """
    for name, rule in (ARGUMENTS | ADDED).items():
        value = trainer.get(name)
        if rule.is_unset(value):
            continue
        if rule.handling != "works":
            raise UserError(f"trainer.{name}", f"{_shown(value)} cannot be set: {rule.note}")
        if rule.accepts is not None and not rule.accepts(value):
            raise UserError(f"trainer.{name}", f"{_shown(value)} is not allowed; {rule.allowed}")
    if trainer.get("max_time") is not None:
        seconds_of(trainer["max_time"])
    if trainer.get("gradient_clip_algorithm") is not None and trainer.get("gradient_clip_val") is None:
        raise UserError(
            "trainer.gradient_clip_algorithm",
            f"it is {trainer['gradient_clip_algorithm']}, and `trainer.gradient_clip_val` is not set: "
            "nothing would be clipped",
        )
    for key, entry in _entries(trainer.get("callbacks")):
        path = str(entry.get("class_path")) if isinstance(entry, Mapping) else ""
        if path.startswith(_LIGHTNING):
            _check_callback(path.rpartition(".")[2], entry.get("init_args") or {}, trainer, key)


def check_built(callbacks: Any) -> None:
    """Refuse callbacks of other packages that are derived from a refused one of Lightning.

    Args:
        callbacks: built: a list, one callback, or None.

    Raises:
        UserError: the first such callback.
    """
    for key, callback in _entries(callbacks):
        for base in type(callback).__mro__:
            rule = CALLBACKS.get(base.__name__) if base.__module__.startswith(_LIGHTNING) else None
            if rule is not None and rule.handling == "refused":
                raise UserError(key, f"{type(callback).__name__} is a {base.__name__}: {rule.note}")


def seconds_of(max_time: Any) -> float:
    """Return the seconds of `trainer.max_time`.

    Args:
        max_time: "DD:HH:MM:SS", or a mapping such as `{hours: 1, minutes: 30}`.

    Raises:
        UserError: no such duration, or none above 0.
    """
    found = None
    if isinstance(max_time, timedelta):
        found = max_time
    elif isinstance(max_time, str):
        parts = re.fullmatch(r"(\d+):(\d\d):(\d\d):(\d\d)", max_time.strip())
        if parts is not None:
            days, hours, minutes, seconds = map(int, parts.groups())
            found = timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)
    elif isinstance(max_time, Mapping) and all(map(_is_number, max_time.values())):
        try:
            found = timedelta(**max_time)
        except (TypeError, OverflowError):
            found = None
    if found is None or found.total_seconds() <= 0:
        raise UserError(
            "trainer.max_time",
            f"{_shown(max_time)} is no duration; write a text 'DD:HH:MM:SS' above 0 in quotes, or a mapping "
            "such as {hours: 1}",
        )
    return found.total_seconds()


def _check_callback(name: str, arguments: Mapping[str, Any], trainer: Mapping[str, Any], key: str) -> None:
    """Refuse a callback of Lightning by the name of its class."""
    rule = CALLBACKS.get(name)
    if rule is not None and rule.handling == "refused":
        raise UserError(key, f"{name} cannot be set: {rule.note}")
    if name != "EarlyStopping":
        return
    if arguments.get("check_on_train_epoch_end"):
        raise UserError(
            f"{key}.check_on_train_epoch_end", f"true would never act, because {_ENDLESS}; leave it out"
        )
    idle = next((one for one in ("val_check_interval", "limit_val_batches") if _never(one, trainer)), None)
    if idle is not None:
        raise UserError(
            key,
            f"EarlyStopping looks at validations, and with `trainer.{idle}` {trainer.get(idle)} there is "
            "none before the end",
        )


def _never(name: str, trainer: Mapping[str, Any]) -> bool:
    """Whether an argument leaves a run without validations on the way."""
    return trainer.get(name) is None if name == "val_check_interval" else trainer.get(name) == 0


def _entries(callbacks: Any) -> Iterator[tuple[str, Any]]:
    """Yield key and entry of each callback."""
    if isinstance(callbacks, list):
        for number, entry in enumerate(callbacks):
            yield f"trainer.callbacks.{number}", entry
    elif callbacks is not None:
        yield "trainer.callbacks", callbacks


def _shown(value: Any) -> str:
    """A value as an error shows it; a class by its path."""
    return str(value["class_path"]) if isinstance(value, Mapping) and "class_path" in value else repr(value)


def as_markdown() -> str:
    """Return both tables as docs/trainer-arguments.md shows them."""
    return "\n".join([*_rows("argument", ARGUMENTS | ADDED), "", *_rows("callback", CALLBACKS), ""])


def _rows(heading: str, rules: Mapping[str, Rule]) -> Iterator[str]:
    yield f"| {heading} | in a run | |"
    yield "|---|---|---|"
    for name, rule in rules.items():
        yield f"| `{name}` | {rule.handling} | {rule.note} |"
