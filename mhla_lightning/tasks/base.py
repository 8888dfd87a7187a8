"""What the tasks share: configuration checked at once, the backbone built late, optimizer and schedule."""

from __future__ import annotations

import copy
import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from mhla_lightning.attention import MixingMatrix
from mhla_lightning.backbones import Backbone, build_backbone
from mhla_lightning.tasks.optimization import OptimizerConfig, ScheduleConfig
from mhla_lightning.weights.warm_start import freeze_except, load_matching, read_weights, weight_file

log = logging.getLogger(__name__)
PREFIXES = (
    "val",
    "val_ema",
    "test",
    "test_ema",
)  # of what `evaluate` measures; callbacks.EMA adds the averaged weights


class Task(pl.LightningModule):
    """A LightningModule around a backbone of the registry.

    The configuration is checked in ``__init__`` on the meta device; weights exist only after
    ``configure_model``, so that ZeRO-3 and FSDP2 never hold the whole model.

    Args:
        backbone: name in the backbone registry.
        attention: attention entry: name, mapping, or a list of these cycled over the layers.
        backbone_options: the backbone's own options.
        optimizer, schedule: see their classes.
        init_from: weights to start from: a file, a folder or a run.
        train_only: regular expressions; parameters that none finds are frozen.
        checkpoint_activations: `blocks` recomputes every block in the backward to save memory.

    Attributes:
        gradient_norm: of the step to be taken, where a callback has measured it; clipping then does not
            measure it again.

    Raises:
        UserError: unknown names or options, sizes that do not fit.
    """

    gradient_norm: Tensor | None = None

    def __init__(
        self,
        backbone: str,
        attention: str | Mapping[str, Any] | Sequence[Any] = "mhla",
        backbone_options: Mapping[str, Any] | None = None,
        optimizer: OptimizerConfig | None = None,
        schedule: ScheduleConfig | None = None,
        init_from: str | None = None,
        train_only: list[str] | None = None,
        checkpoint_activations: Literal["none", "blocks"] = "none",
    ) -> None:
        super().__init__()
        self.backbone_name, self.attention, self.backbone_options = (
            backbone,
            attention,
            dict(backbone_options or {}),
        )
        self.optimizer_config, self.schedule_config = (
            optimizer or OptimizerConfig(),
            schedule or ScheduleConfig(),
        )
        self.init_from, self.train_only, self.checkpoint_activations = (
            init_from,
            list(train_only or []),
            checkpoint_activations,
        )
        self.backbone: nn.Module | None = None
        plan = self._weightless()
        if self.init_from:
            weight_file(self.init_from)
        self.parameter_count = sum(p.numel() for p in plan.parameters())
        self.largest_weight = max(p.numel() for p in plan.parameters())
        self.grid = tuple(cast(Backbone, plan).grid)
        self.flops_per_sample = cast(Backbone, plan).flops(self.grid)

    def _weightless(self) -> nn.Module:
        """The backbone without weights, frozen where it will be."""
        with torch.device("meta"):
            plan = self._build()
        if self.train_only:
            freeze_except(plan, self.train_only)
        return plan

    def _build(self) -> nn.Module:
        return build_backbone(self.backbone_name, attention=self.attention, **self.backbone_options)

    def configure_model(self) -> None:
        """Builds the backbone, once (Lightning calls this before every fit, validate and test)."""
        if self.backbone is not None:
            return
        self.backbone = self._build()
        if self.checkpoint_activations == "blocks":
            cast(Any, self.backbone).set_grad_checkpointing()
        if self.init_from:
            path, state = read_weights(self.init_from)
            report = load_matching(self.backbone, cast(Backbone, self.backbone).adapt_state_dict(state), path)
            rank_zero_only(log.info)(str(report))
        if self.train_only:
            freeze_except(self.backbone, self.train_only)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Lightning's clipping, without its second pass over the gradients where their norm is known."""
        if (
            self.gradient_norm is None
            or not gradient_clip_val
            or gradient_clip_algorithm not in (None, "norm")
        ):
            self.clip_gradients(
                optimizer,
                gradient_clip_val=gradient_clip_val,
                gradient_clip_algorithm=gradient_clip_algorithm,
            )
        else:
            nn.utils.clip_grads_with_norm_(self.parameters(), gradient_clip_val, self.gradient_norm)

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        self.evaluate(batch, "val")

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        self.evaluate(batch, "test")

    @abstractmethod
    def evaluate(self, batch: Mapping[str, Any], prefix: str) -> None:
        """Adds a batch to the metrics logged under `prefix`; the EMA callback calls it with the averaged
        weights in place.
        """

    @abstractmethod
    def check_data(self, facts: Mapping[str, Any], micro_batch: int) -> None:
        """Refuses, before training, data that this model cannot take (UserError).

        facts: what the data module says of its samples, `kind` first. micro_batch: samples a rank takes at
            once.
        """

    def check_batch(self, micro_batch: int) -> None:
        """Refuses what can be refused of so many samples a rank without looking at data. Raises UserError."""

    @abstractmethod
    def example_batch(self, samples: int) -> dict[str, Tensor]:
        """A batch of the shapes that training takes, to measure a step on: samples on the meta device,
        labels and keys with values.
        """

    def rehearsal(self, depth: int | None = None) -> Task:
        """A copy of a task that holds no weights yet, which builds without reading any, perhaps with
        another number of layers.
        """
        twin = copy.deepcopy(self)
        twin.init_from = None
        if depth is not None:
            twin.backbone_options["depth"] = depth
        return twin

    def flops_per_batch(self, samples: int) -> int:
        """Training FLOPs of a batch: forward, and twice that backward."""
        return 3 * self.flops_per_sample * samples

    def build_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer over what trains of the backbone."""
        assert self.backbone is not None, "configure_model has not run"
        mixing = {
            f"{name}.weight"
            for name, module in self.backbone.named_modules()
            if isinstance(module, MixingMatrix)
        }
        no_decay = cast(Backbone, self.backbone).no_weight_decay()
        return self.optimizer_config.build(self.backbone, self._weightless(), no_decay, mixing)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = self.build_optimizer()
        # trainer.estimated_stepping_batches would make Lightning forget the restored data position (Lightning
        # 20550).
        max_steps = self.trainer.max_steps if self.trainer.max_steps > 0 else 0
        schedule = self.schedule_config.build(optimizer, self.optimizer_config.lr, max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def keys(samples: int) -> dict[str, Tensor]:
    """`index`, `epoch` and `weight` of an example batch."""
    return {
        "index": torch.arange(samples),
        "epoch": torch.zeros(samples, dtype=torch.int64),
        "weight": torch.ones(samples),
    }
