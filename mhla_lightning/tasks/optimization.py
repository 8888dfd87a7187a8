"""Optimizer and learning-rate schedule of the tasks."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from mhla_lightning.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, without weight decay on norms, biases, position embeddings and mixing matrices.

    Args:
        lr: peak learning rate.
        betas, eps, weight_decay: AdamW's.
        decay_mixing: decay the mixing matrices too, as the release does in classification (SPEC 1.4).

    Raises:
        UserError: a value that cannot be. The key begins with `optimizer`, the task's argument: a recipe's
            parser builds this object before the task is there to name it.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.05
    decay_mixing: bool = False

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise UserError("optimizer.lr", f"{self.lr} is no learning rate; it must be above 0")
        for name, value in (("weight_decay", self.weight_decay), ("eps", self.eps)):
            if value < 0:
                raise UserError(f"optimizer.{name}", f"{value} is negative; it must be at least 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(
                "optimizer.betas", f"{self.betas} do not fit; both must be at least 0 and below 1"
            )

    def build(
        self, model: nn.Module, plan: nn.Module, no_decay: set[str], mixing: set[str]
    ) -> torch.optim.AdamW:
        """Return AdamW over the trained parameters.

        Args:
            model: holds the parameters.
            plan: the same model without weights. Vectors are not decayed, and under ZeRO-3 every parameter of
                the model looks like one.
            no_decay: names of parameters without decay.
            mixing: names of mixing matrices.
        """
        kept = no_decay - mixing if self.decay_mixing else no_decay | mixing
        groups = param_groups_weight_decay(plan, self.weight_decay, no_weight_decay_list=sorted(kept))
        names = {id(parameter): name for name, parameter in plan.named_parameters()}
        groups = [
            {**group, "params": [model.get_parameter(names[id(parameter)]) for parameter in group["params"]]}
            for group in groups
        ]
        for group in groups:  # a callback may have frozen more than the plan
            group["params"] = [parameter for parameter in group["params"] if parameter.requires_grad]
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps)


def fuse(optimizer: torch.optim.Optimizer) -> None:
    """Let AdamW over weights on CUDA take its fused step.

    One kernel then serves many weights, without temporary memory. A loss scaler and Lightning's clipping go
    on as before: the optimizer is built without `fused`, which would tell them that it unscales gradients
    itself. Other optimizers and devices stay as they are.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if type(optimizer) is not torch.optim.AdamW or any(p.device.type != "cuda" for p in parameters):
        return
    for group in optimizer.param_groups:
        group["fused"] = True


def clip_by_norm(parameters: Iterable[nn.Parameter], limit: float, norm: Tensor) -> None:
    """Scale gradients of a known norm to at most `limit`, without waiting for the device."""
    # On a GPU a coefficient in float64 takes a kernel for each gradient, and in float32 one for all.
    norm = norm.float() if norm.device.type == "cuda" else norm
    nn.utils.clip_grads_with_norm_(parameters, limit, norm)


class RecipeSchedule(LambdaLR):
    """LambdaLR that takes only its position from a checkpoint.

    torch's also takes the rates that the factors multiply. A resumed run would then follow neither its recipe
    nor the earlier one, and its first step the earlier one.
    """

    def get_lr(self) -> list[float | Tensor]:
        """Return the rate of every group; groups that a callback has added keep theirs."""
        rates = list(super().get_lr())
        return rates + [group["lr"] for group in self.optimizer.param_groups[len(rates) :]]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to the saved position, and set the learning rates of this schedule there."""
        step = state_dict["last_epoch"]
        rates = [base * factor(step) for base, factor in zip(self.base_lrs, self.lr_lambdas, strict=True)]
        own = {"lr_lambdas": [None] * len(rates), "_last_lr": rates}
        super().load_state_dict(own | {"last_epoch": step, "_step_count": state_dict["_step_count"]})
        for group, rate in zip(self.optimizer.param_groups, rates, strict=False):  # others were added
            group["lr"] = rate


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate per optimizer step: linear warm-up, then cosine or constant.

    Args:
        name: `cosine` or `constant`.
        warmup_steps: optimizer steps of warm-up.
        warmup_lr: learning rate at step 0 of a warm-up.
        min_lr: learning rate at the last step of `cosine`.

    Raises:
        UserError: a negative value; keys as in :class:`OptimizerConfig`.
    """

    name: Literal["cosine", "constant"] = "cosine"
    warmup_steps: int = 0
    warmup_lr: float = 1e-6
    min_lr: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (
            ("warmup_steps", self.warmup_steps),
            ("warmup_lr", self.warmup_lr),
            ("min_lr", self.min_lr),
        ):
            if value < 0:
                raise UserError(f"schedule.{name}", f"{value} is negative; it must be at least 0")

    def lr_at(self, step: int, peak: float, max_steps: int) -> float:
        """Return the learning rate of an optimizer step.

        Args:
            step: from 0.
            peak: learning rate after the warm-up.
            max_steps: length of the run.
        """
        if step < self.warmup_steps:
            return self.warmup_lr + (peak - self.warmup_lr) * step / self.warmup_steps
        if self.name == "constant":
            return peak
        progress = min(1.0, (step - self.warmup_steps) / max(1, max_steps - self.warmup_steps))
        return self.min_lr + (peak - self.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))

    def build(self, optimizer: torch.optim.Optimizer, peak: float, max_steps: int) -> LambdaLR:
        """Return the schedule as torch's scheduler, to be stepped once an optimizer step.

        Raises:
            UserError: no length to decay over.
        """
        if max_steps < 1 and self.name == "cosine":
            raise UserError(
                "schedule.name", "cosine needs the run's length; set `trainer.max_steps` or `data.epochs`"
            )
        if 0 < max_steps <= self.warmup_steps:
            log.warning(
                f"model.schedule.warmup_steps is {self.warmup_steps} and the run has {max_steps} "
                "steps: all of it is warm-up"
            )
        return RecipeSchedule(optimizer, lambda step: self.lr_at(step, peak, max_steps) / peak)

    def change_peak(self, schedule: RecipeSchedule, peak: float, max_steps: int) -> None:
        """Give a running schedule another peak, from its next step on and for the current rate.

        Args:
            schedule: of :meth:`build`.
            peak: learning rate after the warm-up.
            max_steps: length of the run.
        """
        count = len(schedule.base_lrs)
        schedule.base_lrs = [peak] * count
        schedule.lr_lambdas = [lambda step: self.lr_at(step, peak, max_steps) / peak] * count
        schedule.load_state_dict(schedule.state_dict())
