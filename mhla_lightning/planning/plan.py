"""What a recipe takes on a cluster: batches, parameters, FLOPs, length and memory.

Known before a GPU is requested.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from mhla_lightning.attention import CausalSelfAttention, MHLACrossAttention, MixingMatrix, SelfAttention
from mhla_lightning.backbones.text_attention import CrossAttention
from mhla_lightning.config.length import length
from mhla_lightning.config.resolve import Resolved
from mhla_lightning.data.modules.base import ShardDataModule
from mhla_lightning.errors import UserError, inside
from mhla_lightning.planning.gpus import GPU
from mhla_lightning.planning.state_memory import ModelSize, StateMemory, partitioned, replicated
from mhla_lightning.planning.step_flops import recomputed_flops
from mhla_lightning.planning.step_memory import Precision, activation_bytes, find_precision
from mhla_lightning.strategies.config import ZERO, StrategyEntry, deepspeed_config, is_zero, strategy_name
from mhla_lightning.tasks import Task

UTILISATION = 0.4
"""Share of a GPU's peak that training is taken to reach where nobody says: an assumption, not a
measurement.
"""

SOURCES = {
    "state": "formula: bytes of weights, gradients, optimizer, average and buffers, by strategy",
    "activations": "modelled: a training step on tensors without data, whose allocations are added up",
    "flops_per_sample": "formula: matrix products of a forward",
    "recomputed_flops": "counted: products of the modelled step, with and without checkpoint_activations",
}
"""What a plan's numbers come from; none of them was measured on a GPU."""

AVERAGES = ("mhla_lightning.callbacks.EMA", "mhla_lightning.callbacks.ema.EMA")
"""Class paths of the callbacks that keep an average of the weights: a layer above imports them."""


@dataclass(frozen=True)
class Batches:
    """How one optimizer step's samples are spread: batch = ranks x micro x accumulation."""

    batch: int
    ranks: int
    micro: int
    accumulation: int


@dataclass(frozen=True)
class Length:
    """How long a run is; None where the data, which is not there, would have to say.

    Attributes:
        steps: of the optimizer.
        samples: of the training data.
        epochs: passes over them.
    """

    steps: int | None
    samples: int | None
    epochs: float | None


@dataclass(frozen=True)
class Stage:
    """A strategy's memory on one GPU.

    Attributes:
        state: see StateMemory.
        total: bytes held at once, at most; None where activations are not known.
        fits: whether the GPU takes that; None where either is not known.
    """

    state: StateMemory
    total: int | None
    fits: bool | None


@dataclass(frozen=True)
class Plan:
    """What a recipe takes on so many GPUs.

    Attributes:
        values: the resolved recipe.
        strategy: name of the one that is chosen; None for one whose memory is not known.
        precision: of Lightning, by its long name.
        nodes, gpus_per_node, gpu: the cluster; gpu None leaves out what depends on it.
        batches, length: see their classes.
        parameters: elements, `total`, `trained`, and by kind.
        tokens: of one sample.
        flops_per_sample: of a forward, a multiply-add being two.
        recomputed_flops: of one sample, that `checkpoint_activations` adds to forward and backward; None
            where the step cannot run on tensors without data.
        activations: bytes that forward and backward of a micro batch hold; None as for `recomputed_flops`.
        stages: every strategy by name.
        deepspeed: its configuration; None without a ZeRO preset.
        utilisation: share of the peak that `seconds` stands on.
        advice: what would fit where the chosen one does not, best first.
        notes: what is not known, and why.
    """

    values: dict[str, Any]
    strategy: str | None
    precision: str
    nodes: int
    gpus_per_node: int
    gpu: GPU | None
    batches: Batches
    length: Length
    parameters: dict[str, int]
    tokens: int
    flops_per_sample: int
    recomputed_flops: int | None
    activations: int | None
    stages: dict[str, Stage]
    deepspeed: dict[str, Any] | None
    utilisation: float = UTILISATION
    advice: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool | None:
        """Whether the chosen strategy fits; None where that is not known."""
        return None if self.strategy is None else self.stages[self.strategy].fits

    @property
    def fitting(self) -> list[str]:
        """The strategies that fit, those with the least communication first."""
        return [name for name, stage in self.stages.items() if stage.fits]

    @property
    def training_flops(self) -> int | None:
        """FLOPs of the whole run: three forwards a sample, and what the backward runs again."""
        if self.length.steps is None:
            return None
        sample = 3 * self.flops_per_sample + (self.recomputed_flops or 0)
        return sample * self.batches.batch * self.length.steps

    @property
    def peak(self) -> float | None:
        """FLOP/s of one GPU in this precision."""
        return None if self.gpu is None else self.gpu.fp32 if self.precision == "32-true" else self.gpu.bf16

    @property
    def seconds(self) -> float | None:
        """Of the whole run at `utilisation`."""
        if self.training_flops is None or self.peak is None:
            return None
        return self.training_flops / (self.peak * self.utilisation * self.batches.ranks)

    def to_dict(self) -> dict[str, Any]:
        """For JSON, what is derived included; bytes, elements, FLOPs and seconds."""
        return {
            **asdict(self),
            "fits": self.fits,
            "training_flops": self.training_flops,
            "seconds": self.seconds,
            "sources": SOURCES,
        }


def make_plan(
    recipe: Resolved,
    *,
    nodes: int = 1,
    gpus_per_node: int = 1,
    gpu: GPU | None = None,
    strategy: StrategyEntry | None = None,
    utilisation: float = UTILISATION,
) -> Plan:
    """Works a plan out, without a GPU, without other processes and without weights.

    Args:
        recipe: resolved; its task holds no weights. Its data need not be there, unless they decide an `auto`.
        nodes, gpus_per_node: of the cluster.
        gpu: kind of GPU.
        strategy: in place of trainer.strategy.
        utilisation: share of the GPU's peak, for the time.

    Raises:
        UserError: a batch that does not divide, data that does not fit the model, a precision that is not
            known.
    """
    if min(nodes, gpus_per_node) < 1:
        key, count = min((("nodes", nodes), ("gpus_per_node", gpus_per_node)), key=lambda item: item[1])
        raise UserError(key, f"{count} is too small; a cluster has at least 1")
    if not 0 < utilisation <= 1:
        raise UserError(
            "utilisation", f"{utilisation} is no share of the GPU's peak; it is above 0 and at most 1"
        )
    precision = find_precision(recipe.trainer.get("precision", "32-true"))
    recipe.take_from_data()
    ranks = nodes * gpus_per_node
    with inside("data"):
        batches = Batches(recipe.data.batch_size, ranks, *recipe.data.micro_batch(ranks))
    recipe.task.check_batch(batches.micro)
    run_length, notes = _length(recipe, batches)
    entry = recipe.trainer.get("strategy", "auto") if strategy is None else strategy
    cases = _Cases(recipe, precision, batches, gpu, entry)
    activations: int | None = None
    recomputed: int | None = None
    try:
        activations = activation_bytes(recipe.task, batches.micro, precision)
        recomputed = recomputed_flops(recipe.task, batches.micro, precision)
    except (RuntimeError, NotImplementedError, UserError) as error:
        notes += (f"activations could not be modelled without a GPU: {' '.join(str(error).split())[:200]}",)
    chosen = _planned_name(entry)
    if chosen is None:
        notes += ("the memory of this trainer.strategy is not known; the table shows those that mhla brings",)
    stages = cases.stages(activations)
    return Plan(
        values=recipe.values,
        strategy=chosen,
        precision=precision.name,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        gpu=gpu,
        batches=batches,
        length=run_length,
        parameters=cases.parameters,
        tokens=torch.Size(recipe.task.grid).numel(),
        flops_per_sample=recipe.task.flops_per_sample,
        recomputed_flops=recomputed,
        activations=activations,
        stages=stages,
        deepspeed=_deepspeed(recipe, batches, entry),
        utilisation=utilisation,
        advice=cases.advice(stages, chosen) if chosen is not None and stages[chosen].fits is False else (),
        notes=notes,
    )


def _planned_name(entry: Any) -> str | None:
    """The row of the table that an entry means."""
    name = strategy_name(entry)
    return (
        name
        if name in ZERO
        else "ddp"
        if name is not None and (name == "auto" or name.startswith("ddp"))
        else None
    )


def _length(recipe: Resolved, batches: Batches) -> tuple[Length, tuple[str, ...]]:
    """Return the length of a run, and notes on what is unknown of it.

    Raises UserError as config.length does, and for data that does not fit the model.
    """
    data, steps = recipe.data, recipe.trainer.get("max_steps", -1)
    if data.epochs is None or steps > 0:
        steps = length(recipe)  # says so where both or neither are set
    if not _there(data):
        sizes = ", and sizes are counted as `data.image_size`" if data.order.buckets is not None else ""
        left = "how many steps that makes" if data.epochs is not None else "how many epochs that makes"
        return Length(steps if steps > 0 else None, None, data.epochs), (
            f"no shards in {data.path}: {left} is not known{sizes}",
        )
    with inside("model"):
        recipe.task.check_data(data.facts(), batches.micro)
    steps = length(recipe)
    return Length(steps, data.samples, steps * batches.batch / data.samples), ()


def _there(data: ShardDataModule) -> bool:
    """Whether the data can be read here; a store that cannot be asked counts as no."""
    try:
        return data.is_ready()
    except UserError:
        return False


def _deepspeed(recipe: Resolved, batches: Batches, entry: Any) -> dict[str, Any] | None:
    if not is_zero(entry):
        return None
    return deepspeed_config(
        entry,
        micro_batch=batches.micro,
        accumulation=batches.accumulation,
        gradient_clip=recipe.trainer.get("gradient_clip_val"),
        precision=recipe.trainer.get("precision", "32-true"),
        accelerator="cuda",
    )


class _Cases:
    """The strategies and changes of a recipe that are compared."""

    def __init__(
        self, recipe: Resolved, precision: Precision, batches: Batches, gpu: GPU | None, entry: Any
    ) -> None:
        self.recipe, self.precision, self.batches, self.gpu, self.entry = (
            recipe,
            precision,
            batches,
            gpu,
            entry,
        )
        with torch.device("meta"):
            twin = recipe.task.rehearsal()
            twin.configure_model()
        self.size = ModelSize.of(twin)
        self.parameters = {
            "total": self.size.elements,
            "trained": self.size.trained_elements,
            **_by_kind(twin),
        }
        self.average = _keeps_average(recipe)

    def stages(self, activations: int | None) -> dict[str, Stage]:
        """Every strategy's memory with these activations."""
        states = [replicated(self.size, self.precision, self.average)]
        states += [self._zero(self.entry if strategy_name(self.entry) == name else name) for name in ZERO]
        return {state.strategy: self._stage(state, activations) for state in states}

    def _zero(self, entry: StrategyEntry) -> StateMemory:
        config = _deepspeed(self.recipe, self.batches, entry) or {}
        wide = config.get("data_types", {}).get("grad_accum_dtype") == "fp32"
        zero = config["zero_optimization"]
        return partitioned(
            str(strategy_name(entry)),
            self.size,
            self.precision,
            self.batches.ranks,
            self.average,
            zero,
            4 if wide else None,
        )

    def _stage(self, state: StateMemory, activations: int | None) -> Stage:
        total = None if activations is None else state.total(activations)
        return Stage(state, total, None if total is None or self.gpu is None else total <= self.gpu.usable)

    def advice(self, stages: Mapping[str, Stage], chosen: str) -> tuple[str, ...]:
        """Return what fits instead of the chosen strategy.

        Another strategy, else a change of the recipe, perhaps with another strategy.
        """
        fitting = [name for name, stage in stages.items() if stage.fits]
        if fitting:
            return tuple(f"trainer.strategy {name}" for name in fitting)
        found = []
        for change, task in self._settings():
            for size, stages in self._by_size(task):
                fitting = [name for name, stage in stages.items() if stage.fits]
                if fitting:
                    words = [change] * bool(change) + [f"data.micro_batch_size {size}"] * (
                        size < self.batches.micro
                    )
                    other = [] if chosen in fitting else [f"trainer.strategy {fitting[0]}"]
                    found.append(", ".join([*words, *other]))
                    break
        return tuple(found)

    def _by_size(self, task: Task) -> Iterator[tuple[int, dict[str, Stage]]]:
        """Yield the stages with every micro batch that the task takes, the largest first.

        Activations are linear in its size.
        """
        few, many = self._sizes[0], self._sizes[-1]
        least, most = (activation_bytes(task, size, self.precision) for size in (few, many))
        for size in reversed(self._sizes):
            yield size, self.stages(least + (most - least) * (size - few) // max(1, many - few))

    def _settings(self) -> list[tuple[str, Task]]:
        """The task as it is, and with less to remember where it is told to remember all."""
        settings = [("", self.recipe.task)]
        if self.recipe.task.checkpoint_activations == "none":
            twin = self.recipe.task.rehearsal()
            twin.checkpoint_activations = "blocks"
            settings.append(("model.checkpoint_activations blocks", twin))
        return settings

    @cached_property
    def _sizes(self) -> list[int]:
        """Micro batches up to the recipe's that its batch and task take, the smallest first."""
        rank = self.batches.micro * self.batches.accumulation
        return [
            size
            for size in range(1, self.batches.micro + 1)
            if rank % size == 0 and _takes(self.recipe.task, size)
        ]


def _keeps_average(recipe: Resolved) -> bool:
    """Whether the recipe's callbacks keep an average of the weights."""
    given = recipe.values["trainer"].get("callbacks") or []
    return any(
        callback["class_path"] in AVERAGES for callback in (given if isinstance(given, list) else [given])
    )


def _takes(task: Task, micro_batch: int) -> bool:
    try:
        task.check_batch(micro_batch)
    except UserError:
        return False
    return True


def _by_kind(task: Task) -> dict[str, int]:
    """Parameters by the part of the model that they belong to, each counted once."""
    assert task.backbone is not None, "configure_model has not run"
    kinds: dict[int, str] = {}
    for name, module in task.backbone.named_modules():
        kind = next((kind for kind, types in _KINDS.items() if isinstance(module, types)), None)
        if kind is None and name.rpartition(".")[0].rpartition(".")[2] in _STACKS:
            kind = "rest of the layers"
        if kind is not None:
            kinds |= {id(parameter): kind for parameter in module.parameters()}
    counts: dict[str, int] = {}
    for parameter in task.backbone.parameters():
        kind = kinds.get(id(parameter), "embeddings and head")
        counts[kind] = counts.get(kind, 0) + parameter.numel()
    return counts


_KINDS: dict[str, tuple[type[nn.Module], ...]] = {
    "mixing matrices": (MixingMatrix,),
    "attention": (SelfAttention, CausalSelfAttention, CrossAttention, MHLACrossAttention),
}
_STACKS = ("blocks", "layers")  # what backbones call their list of layers
