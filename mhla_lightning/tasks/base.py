"""The base of all tasks: checks the configuration, builds the backbone and the optimizer."""

from __future__ import annotations

import copy
import logging
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Literal, Protocol, Self, cast, runtime_checkable

import lightning.pytorch as pl
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from mhla_lightning.arguments.hints import argument_hints
from mhla_lightning.arguments.plain import KeepsArguments, plain
from mhla_lightning.arguments.saved import refuse_hparams
from mhla_lightning.attention import Attention, MixingMatrix
from mhla_lightning.backbones import Backbone, build_backbone, described_geometry, timm_geometry
from mhla_lightning.backbones.activations import Activations, KeepsActivations
from mhla_lightning.backbones.compiling import Compilation
from mhla_lightning.backbones.layers import mixing_weights
from mhla_lightning.backbones.sizes import TakesSizes
from mhla_lightning.errors import UserError, inside
from mhla_lightning.tasks.batches import (
    LabelChecks,
    Stage,
    is_complete,
    named,
    positioned,
    trainer_of,
)
from mhla_lightning.tasks.optimization import (
    OptimizerConfig,
    RecipeSchedule,
    ScheduleConfig,
    clip_by_norm,
    fuse,
)
from mhla_lightning.tasks.projection import PROJECTION, mixing_matrices, project
from mhla_lightning.tasks.restoring import TASK, load_task
from mhla_lightning.tasks.sizes import Size, size_name, take_sizes
from mhla_lightning.tasks.trainers import (
    GathersWeights,
    check_copies,
    check_precision,
    check_strategy,
    run_length,
)
from mhla_lightning.weights.adapted import Geometry, ModelFacts, WeightState
from mhla_lightning.weights.facts import facts_of
from mhla_lightning.weights.moments import GROUPS, OPTIMIZER, fitted, label, optimizer_class
from mhla_lightning.weights.warm_start import InitFrom, WarmStart, freeze_except, start_from, weight_file

log = logging.getLogger(__name__)
# Prefixes of the metrics that `evaluate` logs; those with `_ema` are for the weights averaged by EMA.
PREFIXES = ("val", "val_ema", "test", "test_ema")
Drawing = Callable[[Mapping[str, Any]], dict[str, Tensor]]


@runtime_checkable
class GivesFacts(Protocol):
    """What a task asks of a data module of ours."""

    def facts(self) -> dict[str, Any]:
        """Return the facts of the data, `kind` first."""
        ...

    def micro_batch(self, world_size: int) -> tuple[int, int]:
        """Return the samples that a rank takes at once and the accumulation steps."""
        ...


class Task(KeepsArguments, pl.LightningModule):
    """A LightningModule around a backbone of the registry.

    The configuration is checked in ``__init__`` on the meta device; weights exist only after
    ``configure_model``, so that ZeRO-3 never holds the whole model.

    Args:
        backbone: name in the backbone registry.
        attention: attention entry: name, mapping, or a list of these cycled over the layers.
        backbone_options: the backbone's own options.
        optimizer, schedule: see their classes; None takes their defaults.
        init_from: weights to start from: a file, a folder or a run; None starts from random weights. An
            :class:`InitFrom` also says which weights of it, and of which token grid.
        train_only: regular expressions; parameters that none finds are frozen. None trains all.
        checkpoint_activations: what the backward recomputes or fetches to save memory, see
            :data:`Activations`.
        compile: `blocks` or `whole` compiles the backbone for training and validation, and a
            :class:`Compilation` also takes torch.compile's arguments; None does not.

    Attributes:
        parameter_count: parameters of the backbone.
        largest_weight: elements of its largest parameter.
        grid: tokens per axis of a sample.
        flops_per_sample: forward FLOPs of a sample, on average where samples have several sizes.
        largest_flops: forward FLOPs of a sample of the largest size.
        eval_sizes: sizes of samples besides the trained one at which validation samples are evaluated.
        train_sizes: sizes of training samples and the share of each, as the data module tells; empty where
            all have one.
        compiled_parts: modules of the backbone that are compiled; empty before it is built.
        warm_start: which weights of `init_from` were copied, are new or were left; None before they are read.

    Raises:
        UserError: unknown names or options, sizes that do not fit.
    """

    def __init__(
        self,
        backbone: str,
        attention: str | Mapping[str, Any] | Sequence[Any] = "mhla",
        backbone_options: Mapping[str, Any] | None = None,
        optimizer: OptimizerConfig | None = None,
        schedule: ScheduleConfig | None = None,
        init_from: str | InitFrom | None = None,
        train_only: list[str] | None = None,
        checkpoint_activations: Activations = "none",
        compile: Literal["blocks", "whole"] | Compilation | None = None,
    ) -> None:
        super().__init__()
        self.backbone_name, self.attention = backbone, attention
        self.backbone_options = dict(backbone_options or {})
        self.optimizer_config = optimizer or OptimizerConfig()
        self.schedule_config = schedule or ScheduleConfig()
        self.init_from, self.train_only = init_from, list(train_only or [])
        self.checkpoint_activations = checkpoint_activations
        self.compilation = Compilation(compile) if isinstance(compile, str) else compile
        self.backbone: nn.Module | None = None
        self.compiled_parts: list[nn.Module] = []
        self._gathers_weights = False
        self.warm_start: WarmStart | None = None
        self._gradient_norm: Tensor | None = None
        self._mixing: list[MixingMatrix] | None = None
        self._logs_loss = True
        self.label_checks = LabelChecks()
        self._step_losses: list[Tensor] = []
        self._logged_step = 0
        self._lr_changed = False
        self._optimizer_facts: dict[str, Any] = {}
        self.eval_sizes: tuple[Size, ...] = ()
        self.train_sizes: dict[Size, float] = {}
        self._source_geometry: Geometry | None = None
        self._source_facts: ModelFacts | None = None
        plan = self._weightless()
        self._check_execution(plan)
        if self.init_from:
            self._source_facts = facts_of(weight_file(self.init_from))
            self._source_geometry = described_geometry(self._source_facts)
        self._measure(plan)

    def _measure(self, plan: nn.Module) -> None:
        self.parameter_count = sum(p.numel() for p in plan.parameters())
        self.largest_weight = max(p.numel() for p in plan.parameters())
        self.grid = tuple(cast(Backbone, plan).grid)
        self.flops_per_sample = self.largest_flops = cast(Backbone, plan).flops(self.grid)
        self._operators = list(dict.fromkeys(type(m) for m in plan.modules() if isinstance(m, Attention)))
        if self.train_sizes and isinstance(plan, TakesSizes):
            of_size = {size: cast(Backbone, plan).flops(plan.tokens_of(size)) for size in self.train_sizes}
            self.flops_per_sample = round(sum(self.train_sizes[size] * of_size[size] for size in of_size))
            self.largest_flops = of_size[self.largest_size(next(iter(of_size)))]

    def check_device(self, device: torch.device) -> None:
        """Check that every operator of `attention` runs on a device.

        Raises:
            UserError: one does not.
        """
        with inside("attention"):
            for operator in self._operators:
                operator.check_device(device)

    @property
    def waits_for_data(self) -> bool:
        """Whether an argument is `auto`, which the data decide before training."""
        return False

    def take_from_data(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Decide what is `auto`; return these arguments with their values.

        Args:
            facts: the data module's facts about its samples, `kind` first.

        Raises:
            UserError: the data do not tell it.
        """
        return {}

    def _weightless(self) -> nn.Module:
        """Build the backbone without weights, with the same parameters frozen."""
        with torch.device("meta"):
            plan = self._build()
        if self.train_only:
            freeze_except(plan, self.train_only)
        return plan

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the backbone's tensors by name, without building its weights."""
        return {name: tuple(tensor.shape) for name, tensor in self._weightless().state_dict().items()}

    def _build(self) -> nn.Module:
        with backbone_keys():
            made = build_backbone(self.backbone_name, attention=self.attention, **self.backbone_options)
        self._let_take(made)
        return made

    def _let_take(self, backbone: nn.Module) -> None:
        """Let the backbone take all sizes of the task. Raises UserError."""
        take_sizes(backbone, self.backbone_name, "eval_sizes", self.eval_sizes)
        take_sizes(backbone, self.backbone_name, "attention", tuple(self.train_sizes), "the data")

    def take_sizes(self, facts: Mapping[str, Any]) -> None:
        """Let the model take the sizes of the data's samples, before any stage.

        Args:
            facts: the data module's facts; `sizes` holds sizes and their shares where batches have several.

        Raises:
            UserError: sizes that the patch or a layer's blocks cannot take; names all of them.
        """
        if not facts.get("sizes"):
            return
        self.train_sizes = {tuple(size): share for size, share in facts["sizes"].items()}
        plan = self._weightless()
        self._measure(plan)
        if self.backbone is not None:
            self._let_take(self.backbone)

    def largest_size(self, own: Size) -> Size:
        """Return the size of the training samples that needs most memory.

        Args:
            own: the model's, where all samples have it.
        """
        return max(self.train_sizes or [own], key=math.prod)

    def tag(self, prefix: str, size: Sequence[int]) -> str:
        """Return the prefix of a size's metrics: `val`, or `val_64` of another than the trained one."""
        return f"{prefix}_{size_name(size)}" if tuple(size) in self.eval_sizes else prefix

    def tags(self) -> list[str]:
        """Return the prefixes of all metrics."""
        sizes: tuple[Size, ...] = ((), *self.eval_sizes)
        return [self.tag(prefix, size) for prefix in PREFIXES for size in sizes]

    def configure_model(self) -> None:
        """Build the backbone, once; Lightning calls this before every fit, validate and test."""
        if self.backbone is not None:
            return
        self.backbone = self._build()
        if isinstance(self.backbone, KeepsActivations):
            self.backbone.keep_activations(self.checkpoint_activations)
        if self.init_from:
            self.warm_start = start_from(self.backbone, self.init_from, "init_from", self._geometry_of)
            rank_zero_only(log.info)(str(self.warm_start))
        if self.train_only:
            freeze_except(self.backbone, self.train_only)
        if self.compilation is not None:
            self.compiled_parts = self.compilation.apply(self.backbone, self._gathers_weights)

    def start_normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """Return mean and std of the images that the weights of `init_from` were trained on.

        None starts from random weights. Both are empty where the files do not tell them.
        """
        facts = self._source_facts
        return None if facts is None else (facts.mean, facts.std)

    def setup(self, stage: str) -> None:
        """Refuse a strategy, device, average or data that this task cannot take.

        Lightning calls it before training. Raises UserError.
        """
        check_strategy(self.trainer)
        check_copies(self.trainer, self.backbone is not None)
        strategy = self.trainer.strategy
        with inside("model"):
            self.check_device(strategy.root_device)
        if isinstance(strategy, GathersWeights) and strategy.zero_stage_3:
            self.check_gathered("zero3")
            self._gathers_weights = True
        data = cast(Any, self.trainer).datamodule
        if self.waits_for_data and isinstance(data, GivesFacts):
            with inside("model"):
                self.hparams.update(self.take_from_data(data.facts()))
        if stage == "fit" and type(self.optimizer_config) is OptimizerConfig:  # AdamW
            check_precision(self.trainer, self.optimizer_config.eps)
        if isinstance(data, GivesFacts):
            with inside("model"):
                self.take_sizes(data.facts())
        if stage == "fit" and isinstance(data, GivesFacts):
            micro, _ = data.micro_batch(self.trainer.world_size)
            with inside("model"):
                self.check_data(data.facts(), micro)

    def _check_execution(self, plan: nn.Module) -> None:
        """Refuse what cannot be compiled or recomputed. Raises UserError."""
        if self.checkpoint_activations != "none" and not isinstance(plan, KeepsActivations):
            raise UserError(
                "checkpoint_activations", f"'{self.backbone_name}' recomputes nothing; write none"
            )
        if self.compilation is None:
            return
        with inside("compile"):
            self.compilation.check(plan)
        if self.compilation.what == "whole" and self.checkpoint_activations == "offload":
            raise UserError(
                "compile",
                "`whole` leaves no block whose activations `checkpoint_activations` offload could move; take "
                "`blocks`, or another `checkpoint_activations`",
            )

    def check_gathered(self, strategy: str) -> None:
        """Refuse what does not go together with weights that are gathered around every layer.

        Autograd keeps what a product read, so offloaded activations would keep gathered weights. A backbone
        that is compiled as one reads all weights at once.

        Args:
            strategy: its name, for the error.

        Raises:
            UserError: `checkpoint_activations` offload; `compile` whole, or blocks of a backbone that was
                built before the strategy was known.
        """
        if self.checkpoint_activations == "offload":
            raise UserError(
                "checkpoint_activations",
                f"offload would keep the gathered weights of `trainer.strategy` {strategy}; take blocks or "
                "attention, or zero2",
            )
        if self.compilation is not None and self.compilation.what == "whole":
            raise UserError(
                "compile",
                f"whole would gather all weights at once under `trainer.strategy` {strategy}; take blocks, "
                "or zero2",
            )
        if self.compiled_parts and not self._gathers_weights:
            raise UserError(
                "compile",
                "the backbone was compiled before the trainer's strategy was known; leave its building "
                f"(configure_model) to the trainer under {strategy}",
            )

    def _geometry_of(self, state: WeightState) -> Geometry | None:
        return state.geometry or self._source_geometry or timm_geometry(state)

    def built_backbone(self) -> nn.Module:
        """Return the backbone. Raises UserError before it is built."""
        if self.backbone is None:
            raise UserError(None, "the task has no weights yet; call its configure_model() first")
        return self.backbone

    def named_parameters(self, *arguments: Any, **named: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Return names and parameters. Raises UserError before there are any."""
        self.built_backbone()
        return super().named_parameters(*arguments, **named)

    @property
    def lr(self) -> float:
        """The peak learning rate, which the optimizer and its schedule follow, also while training.

        Lightning's learning rate finder sets it.
        """
        return self.optimizer_config.lr

    @lr.setter
    def lr(self, value: float) -> None:
        self.optimizer_config = replace(self.optimizer_config, lr=float(value))
        hints = argument_hints(type(self))
        if "optimizer" in hints:
            self.hparams["optimizer"] = plain(self.optimizer_config, hints["optimizer"])
        self._lr_changed = True
        self._follow_lr()

    def _follow_lr(self) -> None:
        """Bring the running schedule to the learning rate."""
        trainer = trainer_of(self)
        if trainer is None:
            return
        for config in trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, RecipeSchedule):
                self.schedule_config.change_peak(config.scheduler, self.lr, run_length(trainer))

    def clip_by(self, norm: Tensor) -> None:
        """Take the gradient norm of the coming step from a callback that has measured it.

        Clipping then does not measure it again.
        """
        self._gradient_norm = norm

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as Lightning does, without a second pass over gradients of a known norm."""
        by_norm = gradient_clip_algorithm in (None, "norm")
        limit = gradient_clip_val or 0.0  # 0 and less do not clip; less would turn the gradients round
        if self._gradient_norm is not None and limit > 0 and by_norm:
            clip_by_norm(self.parameters(), limit, self._gradient_norm)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def log_loss(self, logs: bool) -> None:
        """Log `train/loss` after every step, or leave it to a callback such as callbacks.Monitor."""
        self._logs_loss = logs

    def on_train_start(self) -> None:
        if self._lr_changed:  # Lightning's finder has set the peak for the first step, whatever the warm-up
            self._follow_lr()
            self._lr_changed = False
        self._step_losses, self._logged_step = [], self.trainer.global_step

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the mean loss over all micro batches and ranks of a step."""
        if not self._logs_loss or not outputs:
            return
        # Lightning has divided it for the backward.
        self._step_losses.append(outputs["loss"].detach() * self.trainer.accumulate_grad_batches)
        if self.trainer.global_step == self._logged_step:  # still accumulating
            return
        self._logged_step = self.trainer.global_step
        loss, several = torch.stack(self._step_losses).mean(), self.trainer.world_size > 1
        self._step_losses.clear()
        self.log("train/loss", loss, prog_bar=True, sync_dist=several)

    @property
    def projects_itself(self) -> bool:
        """Whether every step projects the mixing matrices.

        It does not under manual optimization, nor in a subclass with an `optimizer_step` of its own: these
        need callbacks.ProjectMixing.
        """
        return self.automatic_optimization and type(self).optimizer_step is Task.optimizer_step

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: torch.optim.Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Take a step, and project the mixing matrices before anybody reads the weights.

        A step that was left out needs no exception: projecting weights once more changes nothing.
        """
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        steps = self.trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.current
        # DeepSpeed counts micro batches itself, and Lightning comes here after each of them.
        if steps.ready > steps.completed:
            with cast(Any, self.trainer).profiler.profile(PROJECTION):  # set by Lightning's connector
                if self._mixing is None:
                    self._mixing = mixing_matrices(self)
                project(self._mixing, self.trainer.strategy)

    def draws_ahead(self, training: bool) -> Drawing | None:
        """Return what draws the random numbers of a batch on the host; None needs none.

        Our data modules call it, for training in the loader's workers. A step draws what its batch lacks.

        Args:
            training: whether the batches are to train, not to validate or test.
        """
        return None

    def kept_on_host(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return further entries of the moved batch that the step reads on the host."""
        return {}

    def completed(self, batch: Any, number: int, stage: Stage) -> Mapping[str, Any]:
        """Return a batch with all entries that the steps read; one of our loaders as it is.

        Samples of other loaders get weight 1, and random numbers keyed by their position.

        Args:
            batch: of any loader.
            number: of the batch in its epoch.
            stage: of the step that reads it.

        Raises:
            UserError: an entry is missing or does not fit; names the entry and the shape wanted.
        """
        if is_complete(batch):
            return batch
        return positioned(self.entries(batch, stage), trainer_of(self), number)

    def entries(self, batch: Any, stage: Stage) -> dict[str, Any]:
        """Return a batch of another loader by this task's names. Raises UserError."""
        return named(batch, ())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.evaluate(self.completed(batch, batch_idx, "evaluate"), "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.evaluate(self.completed(batch, batch_idx, "evaluate"), "test")

    @abstractmethod
    def evaluate(self, batch: Mapping[str, Any], prefix: str) -> None:
        """Add a batch to the metrics logged under a prefix.

        The EMA callback calls it with the averaged weights in place.

        Args:
            batch: of a loader.
            prefix: one of PREFIXES.
        """

    @abstractmethod
    def run_backbone(self, batch: Mapping[str, Any]) -> None:
        """Run the backbone on a batch as validation does, and measure nothing.

        What watches its layers calls this.

        Args:
            batch: of a loader, completed; see :meth:`completed`.
        """

    @abstractmethod
    def check_data(self, facts: Mapping[str, Any], micro_batch: int) -> None:
        """Refuse, before training, data that this model cannot take.

        Args:
            facts: the data module's facts about its samples, `kind` first.
            micro_batch: samples a rank takes at once.

        Raises:
            UserError: the data does not fit; keys are this task's arguments.
        """

    def check_batch(self, micro_batch: int) -> None:
        """Refuse a number of samples a rank that cannot work with any data. Raises UserError."""

    @abstractmethod
    def example_batch(self, samples: int) -> dict[str, Tensor]:
        """Return a batch of the shapes of training, the largest where there are several.

        A step is measured on it.
        Samples are on the meta device; labels and keys have values.
        """

    def frozen_models(self) -> list[nn.Module]:
        """Return the models besides the backbone that a training step runs, such as a teacher."""
        return []

    def rehearsal(self, depth: int | None = None) -> Task:
        """Return a copy that builds its backbone without reading any weights.

        Args:
            depth: number of layers; None keeps it.
        """
        twin = copy.deepcopy(self)
        twin.init_from, twin.compilation = None, None
        if depth is not None:
            twin.backbone_options["depth"] = depth
        return twin

    def flops_per_batch(self, samples: int) -> int:
        """Return the training FLOPs of a batch: the forward, and twice that for the backward."""
        return 3 * self.flops_per_sample * samples

    def build_optimizer(self) -> torch.optim.Optimizer:
        """Return the optimizer over the trained parameters of the backbone."""
        backbone = self.built_backbone()
        no_decay, mixing = cast(Backbone, backbone).no_weight_decay(), mixing_weights(backbone)
        return self.optimizer_config.build(backbone, self._weightless(), no_decay, mixing)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        self._mixing = None  # somebody may have replaced a layer since the last fit
        optimizer = self.build_optimizer()
        if isinstance(self.trainer.strategy, SingleDeviceStrategy | DDPStrategy):  # DeepSpeed has its own
            fuse(optimizer)
        schedule = self.schedule_config.build(optimizer, self.optimizer_config.lr, run_length(self.trainer))
        self._resume_by_name(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _resume_by_name(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the optimizer take moments from a checkpoint, by parameter name, and no settings."""
        names = {id(parameter): name for name, parameter in self.named_parameters()}
        groups = [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
        self._optimizer_facts = {
            OPTIMIZER: optimizer_class(optimizer),
            GROUPS: [{"names": members} for members in groups],
        }
        optimizer.register_load_state_dict_pre_hook(partial(fitted, names=groups))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Name the optimizer's class and its parameters.

        A run's own callback has written the groups already, with their settings.
        """
        for key, value in self._optimizer_facts.items():
            checkpoint.setdefault(key, value)
        checkpoint[TASK] = type(self).__name__

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: Any = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **arguments: Any,
    ) -> Self:
        """Return the task of a checkpoint, with its weights; `Task` finds the class by itself.

        Args:
            checkpoint_path: a file of Lightning's, or a checkpoint folder of ours under any strategy.
            map_location: as in torch.load; None keeps the devices of the checkpoint, else takes the CPU.
            hparams_file: refused; the arguments are in the checkpoint.
            strict: whether the names of all weights must agree; None means yes.
            weights_only: False unpickles any object, which runs code of the file; None does not.
            arguments: replace those of the checkpoint.

        Raises:
            UserError: no such checkpoint, of another class, or without arguments.
        """
        refuse_hparams(hparams_file)
        return load_task(cls, checkpoint_path, map_location, strict, weights_only is False, arguments)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        label(checkpoint)


@contextmanager
def backbone_keys() -> Iterator[None]:
    """Turn build_backbone's error keys into a task's: `depth` into `backbone_options.depth`."""
    try:
        yield
    except UserError as error:
        if error.key == "name":
            error.key = "backbone"
        elif error.key is not None and error.key.partition(".")[0] != "attention":
            error.key = f"backbone_options.{error.key}"
        raise
