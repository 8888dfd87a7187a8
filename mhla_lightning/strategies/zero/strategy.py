"""DeepSpeed's ZeRO under Lightning, on GPUs and on CPUs."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

import lightning.pytorch as pl
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.strategies.deepspeed import remove_module_hooks
from lightning.pytorch.trainer.states import TrainerFn
from torch.optim import Optimizer

from mhla_lightning.checkpoints.io import RunCheckpointIO
from mhla_lightning.checkpoints.source import open_source
from mhla_lightning.data.modules.base import ShardDataModule
from mhla_lightning.errors import UserError
from mhla_lightning.strategies.config import (
    StrategyEntry,
    check_version,
    deepspeed_config,
    lightning_precision,
    zero_config,
)
from mhla_lightning.strategies.local import LocalWeights, WholeWeights
from mhla_lightning.strategies.sharding import Sharding, names_by_group
from mhla_lightning.strategies.state import restore
from mhla_lightning.strategies.zero.nvme.disk import check_disk, on_disk, remove_swapped, swap_folder
from mhla_lightning.strategies.zero.patches import leave_out_shared_memory, patch_training
from mhla_lightning.strategies.zero.weights import Zero3Weights, Zero12Weights
from mhla_lightning.strategies.zero.whole_file import save_whole
from mhla_lightning.weights.moments import carry_over, tell_new

Result = TypeVar("Result")
_LARGEST = 10**8  # elements of a buffer of DeepSpeed's where nobody knows the largest weight


@runtime_checkable
class KnowsSizes(Protocol):
    """A module that knows the sizes of its weights before they exist, as a task does."""

    parameter_count: int
    largest_weight: int


@runtime_checkable
class HasCompiledParts(Protocol):
    """A module that knows which parts of it are compiled, as a task does."""

    compiled_parts: list[torch.nn.Module]


class ZeroStrategy(DeepSpeedStrategy, Sharding):
    """ZeRO stages 1 to 3 on CPUs and GPUs, with checkpoints for any number of ranks.

    Lightning's DeepSpeedStrategy lacks four things. It refuses CPUs. It takes neither batch sizes nor real
    autocast from the recipe. At stage 3 it initialises another model than one process does. Its checkpoints
    are pickles for one number of ranks and one stage.

    Two private methods of Lightning 2.6 are overridden, because its public ones call them in the middle of
    their work: `_format_config` and `_setup_model_and_optimizer`.

    Args:
        entry: `trainer.strategy`: a preset's name, or a mapping with keys of DeepSpeed's that replace the
            preset's.
        precision: `trainer.precision`; None takes the trainer's.
        on_cpu: train on CPUs; None takes the trainer's accelerator.

    Raises:
        UserError: see config.zero_config and config.deepspeed_config; a DeepSpeed that was not tested.
    """

    guards_steps = True

    def __init__(
        self, entry: StrategyEntry, precision: str | int | None = None, on_cpu: bool | None = None
    ) -> None:
        check_version()
        self.entry, self._given = entry, (precision, on_cpu)
        if on_cpu is None:
            on_cpu = not torch.cuda.is_available() or os.environ.get("DS_ACCELERATOR") == "cpu"
        if on_cpu:
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is imported
        self.recipe_precision, self.on_cpu = precision or "32-true", on_cpu
        self._swap_folders: set[Path] = set()
        self._formatted = False
        self._names: list[list[str]] = []
        self._configure(1, None, 1)  # raises before anything is started
        super().__init__(config=zero_config(entry), process_group_backend="gloo" if on_cpu else None)

    def set_world_ranks(self) -> None:
        """Take precision and accelerator of the trainer, where none were given.

        Lightning calls it while it builds the trainer, once both are chosen. Raises UserError for a precision
        or an accelerator that does not work here.
        """
        precision, on_cpu = self._given
        if on_cpu is None and isinstance(self.accelerator, CPUAccelerator) != self.on_cpu:
            raise UserError("trainer.accelerator", _other_accelerator(self.on_cpu))
        if precision is None:
            self.recipe_precision = cast(Any, self.precision_plugin).precision
            self._configure(1, None, 1)
            self._given = (self.recipe_precision, on_cpu)
            self.precision_plugin = DeepSpeedPrecision(lightning_precision(self.recipe_precision))  # type: ignore[arg-type]
        super().set_world_ranks()

    def _configure(self, accumulation: int, gradient_clip: float | None, micro_batch: int) -> dict[str, Any]:
        return deepspeed_config(
            self.entry,
            micro_batch=micro_batch,
            accumulation=accumulation,
            gradient_clip=gradient_clip,
            precision=self.recipe_precision,
            accelerator="cpu" if self.on_cpu else "cuda",
        )

    def _format_config(self) -> None:
        """Write DeepSpeed's configuration, once. Lightning's own refuses keys that the recipe gives."""
        if self._formatted:
            return
        self._formatted = True
        trainer = self._module.trainer
        data, micro_batch = cast(Any, trainer).datamodule, 1  # DeepSpeed counts samples with it, no more
        if isinstance(data, ShardDataModule):
            micro_batch, _ = data.micro_batch(trainer.world_size)
        accumulation = trainer.accumulate_grad_batches
        self.config = self._configure(accumulation, trainer.gradient_clip_val, micro_batch)
        zero = self.config["zero_optimization"]
        parameters, _ = _sizes(self._module)
        for key in ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size"):
            if key in zero and parameters:  # DeepSpeed makes buffers of this size, however small the model
                zero[key] = min(zero[key], max(1024, parameters + parameters % 2))
        self._place_on_disk(zero, trainer)

    def _place_on_disk(self, zero: dict[str, Any], trainer: pl.Trainer) -> None:
        """Name a folder of the run's own on the disk, and make buffers hold the largest weight.

        Validation alone keeps weights in memory.
        """
        for place in on_disk(zero):
            if trainer.state.fn != TrainerFn.FITTING:
                zero[place] = {"device": "cpu", "pin_memory": zero[place].get("pin_memory", False)}
                continue
            folder = swap_folder(zero[place]["nvme_path"], Path(trainer.default_root_dir))
            zero[place]["nvme_path"] = str(folder)
            self._swap_folders.add(folder)
            if place == "offload_param":
                self._check_buffers(zero[place], trainer.world_size)

    def _check_buffers(self, parameters: dict[str, Any], world_size: int) -> None:
        """Fill in or check the buffers of weights on a disk.

        Args:
            parameters: `offload_param`.
            world_size: ranks of the run.

        Raises:
            UserError: buffers that are too small, or weights kept in memory.
        """
        key = "trainer.strategy.zero_optimization.offload_param"
        needed = -(-_sizes(self._module)[1] // world_size)
        if parameters.setdefault("buffer_size", needed) < needed:
            raise UserError(
                f"{key}.buffer_size",
                f"{parameters['buffer_size']} is set, and the largest weight has {needed} elements on a "
                "rank; leave the key out",
            )
        # DeepSpeed reads weights that it keeps in memory straight to their places, aligned or not
        # (patches.AlignedReads).
        if parameters.setdefault("max_in_cpu", 0):
            raise UserError(
                f"{key}.max_in_cpu",
                f"{parameters['max_in_cpu']} is set, and only 0 is allowed; device cpu keeps all weights in "
                "memory",
            )

    @property
    def _module(self) -> pl.LightningModule:
        return cast(pl.LightningModule, self.lightning_module)

    @property
    def _fitting(self) -> bool:
        return self._module.trainer.state.fn == TrainerFn.FITTING

    # CPU

    def setup_environment(self) -> None:
        if self._fitting:
            check_disk(zero_config(self.entry)["zero_optimization"])
        if self.on_cpu:
            super(DeepSpeedStrategy, self).setup_environment()  # Lightning's own refuses CPUs
        else:
            super().setup_environment()

    def setup_distributed(self) -> None:
        if self.on_cpu:
            leave_out_shared_memory()
            # Lightning's own wants devices with the indices of the ranks; CPUs have none.
            self.parallel_devices = [torch.device("cpu", rank) for rank in range(self.num_processes)]
        super().setup_distributed()

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", 0) if self.on_cpu else super().root_device

    # Building

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """At stage 3, split weights as they are made.

        Lightning's own lets DeepSpeed round every tensor that is made meanwhile to the weights' precision.
        Tables of angles and mixing matrices are computed in float64; rounded, they would not be those of one
        process. Weights are rounded once, at the end.
        """
        if not self.zero_stage_3:
            yield
            return
        self._format_config()
        import deepspeed
        from deepspeed.utils import set_z3_leaf_module

        from mhla_lightning.strategies.zero.building import InitialiseSplit, round_split

        with (
            deepspeed.zero.Init(
                remote_device=self.remote_device, config_dict_or_path=self.config, tensor_overrides=[]
            ),
            InitialiseSplit(),
        ):
            yield
        # A compiled part gathers all its weights at once, outside of the compiled code. Hooks of the layers
        # inside would be compiled, anew in each step.
        if isinstance(self._module, HasCompiledParts):
            for part in self._module.compiled_parts:
                set_z3_leaf_module(part, True)
        config = cast(dict[str, Any], self.config)
        for kind, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
            if config.get(kind, {}).get("enabled"):
                round_split(self._module, dtype)

    def _setup_model_and_optimizer(
        self, model: torch.nn.Module, optimizer: Optimizer | None, lr_scheduler: Any = None
    ) -> Any:
        zero = cast(dict[str, Any], self.config)["zero_optimization"]
        assert optimizer is not None, "trainer.strategy's `optimizer` is refused"
        self._names = names_by_group(optimizer, model)  # DeepSpeed replaces the parameters by flat tensors
        if "offload_optimizer" in zero and not self.on_cpu:
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            # It shares the groups' dicts, so the schedule still sets their learning rate.
            optimizer = DeepSpeedCPUAdam(optimizer.param_groups, adamw_mode=True)
        engine, own = super()._setup_model_and_optimizer(model, optimizer, lr_scheduler)
        patch_training(engine.optimizer, zero["stage"])
        return engine, own

    def init_deepspeed(self) -> None:
        """Make DeepSpeed's engine. Lightning's own leaves autocast out when it validates."""
        if self._module.trainer.training:
            super().init_deepspeed()
            return
        import deepspeed

        model = cast(torch.nn.Module, self.model)
        remove_module_hooks(model)
        left_out = ("gradient_accumulation_steps", "gradient_clipping")
        config = {
            key: value for key, value in cast(dict[str, Any], self.config).items() if key not in left_out
        }
        if not self.zero_stage_3:
            del config["zero_optimization"]
        arguments = argparse.Namespace(device_rank=self.root_device.index)
        self.model, *_ = deepspeed.initialize(
            args=arguments, config=config, model=model, model_parameters=[], dist_init_required=False
        )

    def _engine_optimizer(self) -> Any:
        return cast(Any, self.model).optimizer

    # Sharding

    @property
    def local_weights(self) -> LocalWeights:
        if self.zero_stage_3:
            optimizer = self._engine_optimizer() if self._fitting else None
            if on_disk(cast(dict[str, Any], self.config)["zero_optimization"]):
                from mhla_lightning.strategies.zero.nvme.weights import DiskWeights

                return DiskWeights(optimizer, self.global_rank)
            return Zero3Weights(optimizer, self.global_rank)
        return Zero12Weights(self._engine_optimizer(), self.global_rank) if self._fitting else WholeWeights()

    def run_forward(self, function: Callable[[], Result]) -> Result:
        """Run a function as the engine's forward: weights are gathered and autocast is on."""
        module = self._module
        own = module.forward

        def redirected() -> Result:
            module.forward = own  # type: ignore[method-assign]  # the function calls the real one
            return function()

        module.forward = redirected  # type: ignore[method-assign]
        try:
            return cast(Any, self.model)()
        finally:
            module.forward = own  # type: ignore[method-assign]

    def gradient_norm(self) -> torch.Tensor | None:
        norm = cast(Any, self.model).get_global_grad_norm()
        return None if norm is None else torch.as_tensor(norm)

    def skipped_step(self) -> bool:
        return bool(self._engine_optimizer().overflow)

    def group_names(self) -> list[list[str]]:
        return self._names

    def backward(
        self, closure_loss: torch.Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Run the backward without DeepSpeed's division of the loss by the micro batches of a step.

        Lightning has divided it already; norms and clipping would be off by that factor.
        """
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    def teardown(self) -> None:
        super().teardown()
        for folder in self._swap_folders:
            remove_swapped(folder, self.global_rank)

    # Checkpoints

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return nothing: every rank writes its own stretches, see save_checkpoint."""
        return {}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return nothing: see lightning_module_state_dict."""
        return {}

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None
    ) -> None:
        """Write Lightning's own file, as one device would; every rank calls it.

        In a run, rank 0 passes on the part that is neither weights nor optimizer state: callbacks.Checkpoint
        writes the others.
        """
        if not isinstance(self.checkpoint_io, RunCheckpointIO):
            save_whole(self._module.trainer, checkpoint, Path(filepath))
        elif self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, filepath)

    @property
    def saves_whole_files(self) -> bool:
        """Whether Lightning's ModelCheckpoint gets all weights."""
        return True

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Fill weights, and in training the optimizer, from a checkpoint of any strategy."""
        source = open_source(Path(checkpoint_path))
        optimizer = self._engine_optimizer() if self._fitting else None
        restore(self.local_weights, self._module, source, optimizer)
        if optimizer is not None:
            tell_new(self._names, [group["names"] for group in source.groups])
            carry_over(optimizer.optimizer, optimizer.optimizer.param_groups, self._names, source.groups)
            self._restore_counters(source.step)
        return dict(source.checkpoint)

    def _restore_counters(self, step: int) -> None:
        engine = cast(Any, self.model)
        engine.global_steps, engine.micro_steps = step, step * engine.gradient_accumulation_steps()
        engine.global_samples = step * engine.train_batch_size()


def _sizes(module: pl.LightningModule) -> tuple[int, int]:
    """Return a module's parameters, 0 where none exist yet, and the elements of the largest."""
    if isinstance(module, KnowsSizes):
        return module.parameter_count, module.largest_weight
    counts = [parameter.numel() for parameter in module.parameters()]
    return sum(counts), max(counts, default=_LARGEST)


def _other_accelerator(on_cpu: bool) -> str:
    """Return why DeepSpeed, imported for another device, cannot use the accelerator."""
    if on_cpu:
        return "it is no CPU, and DS_ACCELERATOR is cpu in the environment; remove that variable"
    return "it is a CPU beside a GPU: set DS_ACCELERATOR=cpu in the environment before Python starts"
