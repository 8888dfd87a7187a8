"""DeepSpeed's ZeRO under Lightning, on GPUs and on CPUs."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.strategies.deepspeed import remove_module_hooks
from lightning.pytorch.trainer.states import TrainerFn
from torch.optim import Optimizer

from mhla_lightning.checkpoints.source import open_source
from mhla_lightning.errors import UserError
from mhla_lightning.strategies.config import StrategyEntry, check_version, deepspeed_config, zero_config
from mhla_lightning.strategies.local import LocalWeights, WholeWeights, Zero3Weights, Zero12Weights
from mhla_lightning.strategies.state import group_names, restore
from mhla_lightning.strategies.zero.norm import norm_of_partitions
from mhla_lightning.strategies.zero.nvme.disk import check_disk, on_disk, remove_swapped, swap_folder
from mhla_lightning.strategies.zero.nvme.gradients import read_aligned

_SHARED_MEMORY_OP = "deepspeed_shm_comm"


class ZeroStrategy(DeepSpeedStrategy):
    """Lightning's DeepSpeedStrategy lacks: CPUs; batch sizes and real autocast from the recipe; an
    initialisation at stage 3 that is that of one process; checkpoints without pickles that any number of
    ranks and any stage can go on from.

    Args:
        entry: `trainer.strategy`: a preset's name, or a mapping with keys of DeepSpeed's that replace the
            preset's.
        precision: `trainer.precision`.
        on_cpu: train on CPUs.

    Attributes:
        micro_batch: samples a rank takes at once; set before training starts.

    Raises:
        UserError: see config.zero_config and config.deepspeed_config; a DeepSpeed that was not tested.
    """

    def __init__(self, entry: StrategyEntry, precision: str | int, on_cpu: bool) -> None:
        check_version()
        if on_cpu:
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is imported
        self.entry, self.recipe_precision, self.on_cpu = entry, precision, on_cpu
        self.micro_batch = 1
        self._swap_folders: set[Path] = set()
        self._configure(1, None)  # says what is wrong before anything is started
        super().__init__(config=zero_config(entry), process_group_backend="gloo" if on_cpu else None)

    def _configure(self, accumulation: int, gradient_clip: float | None) -> dict[str, Any]:
        return deepspeed_config(
            self.entry,
            micro_batch=self.micro_batch,
            accumulation=accumulation,
            gradient_clip=gradient_clip,
            precision=self.recipe_precision,
            accelerator="cpu" if self.on_cpu else "cuda",
        )

    def _format_config(self) -> None:
        trainer = cast(pl.LightningModule, self.lightning_module).trainer
        self.config = self._configure(trainer.accumulate_grad_batches, trainer.gradient_clip_val)
        zero = self.config["zero_optimization"]
        parameters = cast(Any, self.lightning_module).parameter_count
        for key in ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size"):
            if key in zero:  # DeepSpeed makes buffers of this size, however small the model
                zero[key] = min(zero[key], max(1024, parameters + parameters % 2))
        self._place_on_disk(zero, trainer)

    def _place_on_disk(self, zero: dict[str, Any], trainer: pl.Trainer) -> None:
        """Where a disk is used: a folder of the run's own, and buffers that hold the largest weight.
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
                needed = -(-cast(Any, self.lightning_module).largest_weight // trainer.world_size)
                if zero[place].setdefault("buffer_size", needed) < needed:
                    key = f"trainer.strategy.zero_optimization.{place}.buffer_size"
                    raise UserError(
                        f"{key} is {zero[place]['buffer_size']}; the largest weight has {needed} "
                        "elements on a rank; leave the key out"
                    )
                # Weights that DeepSpeed brings back to stay are read straight to their places, aligned or not
                # (see disk_gradients).
                if zero[place].setdefault("max_in_cpu", 0):
                    key = f"trainer.strategy.zero_optimization.{place}.max_in_cpu"
                    raise UserError(
                        f"{key} is {zero[place]['max_in_cpu']}; it can be 0 only; device cpu keeps "
                        "all weights in memory"
                    )

    # CPU

    def setup_environment(self) -> None:
        if cast(pl.LightningModule, self.lightning_module).trainer.state.fn == TrainerFn.FITTING:
            check_disk(zero_config(self.entry)["zero_optimization"])
        if self.on_cpu:
            super(DeepSpeedStrategy, self).setup_environment()  # Lightning's own refuses CPUs
        else:
            super().setup_environment()

    def setup_distributed(self) -> None:
        if not self.on_cpu:
            super().setup_distributed()
            return
        import deepspeed

        # Compiled at the first use, about a minute; and its reductions wait for ever for a rank that has
        # died.
        deepspeed.ops.__compatible_ops__[_SHARED_MEMORY_OP] = False
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", 0) if self.on_cpu else super().root_device

    # Building

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """At stage 3, splits weights as they are made. Lightning's own leaves DeepSpeed to round every tensor
        that is made meanwhile to the weights'
        precision: tables of angles and mixing matrices that are computed in float64 would not be those of one
            process."""
        if not self.zero_stage_3:
            yield
            return
        import deepspeed

        from mhla_lightning.strategies.zero.building import InitialiseSplit

        self._init_config_if_needed()
        with (
            deepspeed.zero.Init(
                remote_device=self.remote_device, config_dict_or_path=self.config, tensor_overrides=[]
            ),
            InitialiseSplit(),
        ):
            yield

    def _setup_model_and_optimizer(
        self, model: torch.nn.Module, optimizer: Optimizer | None, lr_scheduler: Any = None
    ) -> Any:
        zero = cast(dict[str, Any], self.config)["zero_optimization"]
        if optimizer is not None:
            self.group_names = group_names(optimizer, model)  # DeepSpeed puts its flat tensors in their place
        if optimizer is not None and "offload_optimizer" in zero and not self.on_cpu:
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            # Shares the groups' dicts, so that the schedule goes on setting their learning rate.
            optimizer = DeepSpeedCPUAdam(optimizer.param_groups, adamw_mode=True)
        return super()._setup_model_and_optimizer(model, optimizer, lr_scheduler)

    def _initialize_deepspeed_train(self, model: torch.nn.Module) -> None:
        super()._initialize_deepspeed_train(model)
        optimizer = self._engine_optimizer()
        optimizer.check_grad_overflow = (
            True  # stages 1 and 2 look for NaN in float32 gradients only when told; stage 3 always does
        )
        if not self.zero_stage_3:
            optimizer.get_grad_norm_direct = partial(norm_of_partitions, optimizer)
        elif optimizer.swap_optimizer:
            read_aligned(optimizer.optimizer_swapper)

    def _initialize_deepspeed_inference(self, model: torch.nn.Module) -> None:
        """Lightning's own leaves autocast out."""
        import deepspeed

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

    @property
    def local_weights(self) -> LocalWeights:
        """How this rank holds the weights."""
        fitting = cast(pl.LightningModule, self.lightning_module).trainer.state.fn == TrainerFn.FITTING
        if self.zero_stage_3:
            optimizer = self._engine_optimizer() if fitting else None
            if on_disk(cast(dict[str, Any], self.config)["zero_optimization"]):
                from mhla_lightning.strategies.zero.nvme.weights import DiskWeights

                return DiskWeights(optimizer, self.global_rank)
            return Zero3Weights(optimizer, self.global_rank)
        return Zero12Weights(self._engine_optimizer(), self.global_rank) if fitting else WholeWeights()

    def gradient_norm(self) -> torch.Tensor | None:
        """Norm of the last step's gradients before they were clipped, over all ranks; hooks find no
        gradients in the parameters.
        """
        norm = cast(Any, self.model).get_global_grad_norm()
        return None if norm is None else torch.as_tensor(norm)

    def backward(
        self, closure_loss: torch.Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Lightning divides the loss by the micro batches of a step, and so would DeepSpeed: norms and
        clipping would be off by that factor.
        """
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    def skipped_step(self) -> bool:
        """Whether the last optimizer step was left out, on every rank, for gradients that are not finite."""
        return bool(self._engine_optimizer().overflow)

    def teardown(self) -> None:
        super().teardown()
        for folder in self._swap_folders:
            remove_swapped(folder, self.global_rank)

    # Checkpoints

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Nothing: every rank writes its own stretches (callbacks.Checkpoint)."""
        return {}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Nothing: see lightning_module_state_dict."""
        return {}

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None
    ) -> None:
        """Hands on what is not weights and not the optimizer's, on rank 0."""
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, filepath)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Fills weights, and in training the optimizer, from a checkpoint of any strategy and any number
        of ranks.
        """
        source = open_source(Path(checkpoint_path))
        module = cast(pl.LightningModule, self.lightning_module)
        restore(
            self.local_weights,
            module,
            source,
            self._engine_optimizer() if module.trainer.state.fn == TrainerFn.FITTING else None,
        )
        if module.trainer.state.fn == TrainerFn.FITTING:
            self._restore_counters(source.step)
        return dict(source.checkpoint)

    def _restore_counters(self, step: int) -> None:
        engine = cast(Any, self.model)
        engine.global_steps, engine.micro_steps = step, step * engine.gradient_accumulation_steps()
        engine.global_samples = step * engine.train_batch_size()

    def forward_inside(self, function: Any) -> Any:
        """Runs a function of the module as a forward of the engine, where weights are gathered and
        autocast is on.
        """
        module = cast(pl.LightningModule, self.lightning_module)
        module.__dict__["_forwarded"] = function
        try:
            return self._forward_redirection(cast(Any, self.model), module, "_forwarded")
        finally:
            del module.__dict__["_forwarded"]
