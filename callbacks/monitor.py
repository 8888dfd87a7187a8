"""Curves and images of every run in TensorBoard: loss, speed, mixing matrices."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any, cast

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.data import extract_batch_size
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mhla_lightning.attention import MixingMatrix
from mhla_lightning.callbacks.steps import completed, step_guard
from mhla_lightning.data.modules.base import ShardDataModule
from mhla_lightning.planning.gpus import GIB, peak_of_device
from mhla_lightning.runs.pictures import show_image, showing
from mhla_lightning.runs.tags import HEATMAPS, MIXING_VALUES, READS_TEXT, matrix_titles
from mhla_lightning.strategies.sharding import sharding_of
from mhla_lightning.strategies.zero.strategy import ZeroStrategy
from mhla_lightning.tasks.base import Task
from mhla_lightning.tasks.trainers import draws_point

_COLUMNS = 4  # panels side by side in a figure of mixing matrices
_PANELS = 3 * _COLUMNS


class Monitor(pl.Callback):
    """Logs loss, learning rate, gradient norm and speed every `log_every_n_steps` steps.

    The tags are `train/` loss, lr, grad_norm, samples_per_second, tokens_per_second, time_data, time_compute,
    skipped and skipped_steps. A mixture of sources also has train/consumed/SOURCE. On a GPU there are also
    tokens_per_second_per_gpu, mfu, memory_allocated_gib and memory_reserved_gib. The last two are the peaks
    so far of what tensors took, and of what torch took for them. mfu (model FLOPs utilisation) is the model's
    FLOPs a second over the GPU's peak; recomputed activations do not count.

    The loss is the mean over all micro batches and ranks of the last step; self.log would show one rank's
    last micro batch. A step that was left out may have NaN, so the curves have a hole there. Times are
    seconds per optimizer step, on the host: on a GPU the wait for the device counts where a call waits.

    Lightning's ThroughputMonitor and LearningRateMonitor do not measure the time spent waiting for data, and
    name their tags by optimizer group and device.

    Args:
        batch_size: samples of one optimizer step over all processes; None counts them in the batches.
        tokens: tokens of one sample; None takes the task's. Other modules have none: no tokens are shown.
        flops: of one sample in training, forward and backward; None takes the task's.
        precision: None takes the trainer's.
    """

    def __init__(
        self,
        batch_size: int | None = None,
        tokens: int | None = None,
        flops: int | None = None,
        precision: str | int | None = None,
    ) -> None:
        self._given = batch_size, tokens, flops, precision
        self.batch_size, self.tokens, self.flops = batch_size, tokens or 0, flops or 0
        self.precision = str(precision)
        self._skipped = self._samples = 0
        self._losses: list[torch.Tensor] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if isinstance(pl_module, Task):
            pl_module.log_loss(False)  # it would log the same loss once more
        self._take_numbers(trainer, pl_module)
        self._step, self._skipped = trainer.global_step, 0
        self._losses.clear()
        self._restart(time.perf_counter())

    def _take_numbers(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Fill in what was not given."""
        batch_size, tokens, flops, precision = self._given
        task, data = pl_module if isinstance(pl_module, Task) else None, cast(Any, trainer).datamodule
        if batch_size is None and isinstance(data, ShardDataModule):
            batch_size = data.batch_size
        if task is not None:
            tokens = math.prod(task.grid) if tokens is None else tokens
            flops = task.flops_per_batch(1) if flops is None else flops
        if precision is None:
            zero = isinstance(trainer.strategy, ZeroStrategy)  # it shows Lightning another
            precision = trainer.strategy.recipe_precision if zero else trainer.precision  # type: ignore[attr-defined]
        self.batch_size, self.tokens, self.flops = batch_size, tokens or 0, flops or 0
        self.precision = str(precision)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if isinstance(pl_module, Task):
            pl_module.log_loss(True)

    def _restart(self, now: float) -> None:
        self._ended, self._data, self._compute, self._window = now, 0.0, 0.0, self._step
        self._samples = 0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._started = time.perf_counter()
        self._data += self._started - self._ended

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._ended = time.perf_counter()
        self._compute += self._ended - self._started
        batch = completed(pl_module, batch, batch_idx)
        if isinstance(batch, Mapping) and "skipped" in batch:
            self._skipped += int(batch["skipped"])
        if self.batch_size is None:
            self._samples += extract_batch_size(batch) * trainer.world_size
        if outputs:  # none under manual optimization
            # Lightning has divided it for the backward.
            self._losses.append(outputs["loss"].detach() * trainer.accumulate_grad_batches)
        if trainer.global_step == self._step:  # still accumulating
            return
        self._step = trainer.global_step
        if draws_point(trainer):
            self._log(trainer, pl_module)
            self._restart(self._ended)
        self._losses.clear()

    def _log(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        steps = self._step - self._window
        samples = self._samples if self.batch_size is None else self.batch_size * steps
        speed = samples / max(1e-9, self._data + self._compute)
        values = {
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            "samples_per_second": speed,
            "time_data": self._data / steps,
            "time_compute": self._compute / steps,
        }
        if self._losses:
            loss = trainer.strategy.reduce(torch.stack(self._losses).mean(), reduce_op="mean")
            values = {"loss": float(loss), **values}
        if self.tokens:
            values["tokens_per_second"] = speed * self.tokens
        if (guard := step_guard(trainer)) is not None:
            values["skipped_steps"] = float(guard.skipped_steps)
        if (norm := _gradient_norm(trainer)) is not None:
            values["grad_norm"] = float(norm)
        skipped = trainer.strategy.reduce(
            torch.tensor(float(self._skipped), device=pl_module.device), reduce_op="sum"
        )
        values["skipped"] = float(skipped)
        values |= _consumed(trainer)
        if pl_module.device.type == "cuda":
            values |= self.on_gpu(speed / trainer.world_size)
        pl_module.log_dict({f"train/{name}": value for name, value in values.items()})

    def on_gpu(self, speed: float) -> dict[str, float]:
        """Return the values of one GPU that trains `speed` samples a second."""
        values = {
            "tokens_per_second_per_gpu": speed * self.tokens,
            "memory_allocated_gib": torch.cuda.max_memory_allocated() / GIB,
            "memory_reserved_gib": torch.cuda.max_memory_reserved() / GIB,
        }
        products = torch.get_float32_matmul_precision()
        peak = peak_of_device(torch.cuda.get_device_name(), self.precision, products)
        return values if peak is None else values | {"mfu": speed * self.flops / peak}

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._ended = time.perf_counter()  # validation is neither data nor compute of a training step


def _gradient_norm(trainer: pl.Trainer) -> torch.Tensor | None:
    """Return the norm of the last step's gradients, of the strategy or of the guard."""
    sharding, guard = sharding_of(trainer.strategy), step_guard(trainer)
    if sharding.guards_steps:
        return sharding.gradient_norm()
    return guard.gradient_norm if guard is not None else None


def _consumed(trainer: pl.Trainer) -> dict[str, float]:
    """Return the samples consumed of every source, where training mixes several."""
    data = cast(Any, trainer).datamodule
    by_source = data.consumed_by_source() if isinstance(data, ShardDataModule) else {}
    if len(by_source) < 2:
        return {}
    return {f"consumed/{name}": float(count) for name, count in by_source.items()}


class MixingHeatmaps(pl.Callback):
    """Draws every layer's mixing matrix after each validation, as the image `weights/mixing`.

    Rows are query blocks. More than twelve layers make further images, `weights/mixing_2` and so on. The
    values are tensors `mixing_values/LAYER` of the same event file.
    """

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        modules = {
            name: module for name, module in pl_module.named_modules() if isinstance(module, MixingMatrix)
        }
        if not modules or trainer.sanity_checking:
            return
        with sharding_of(trainer.strategy).local_weights.whole(
            [module.weight for module in modules.values()]
        ):
            matrices = {name: module.matrix().detach().clone() for name, module in modules.items()}
        if not trainer.is_global_zero:
            return
        step, loggers = trainer.global_step, showing(trainer.loggers)
        for number, figure in enumerate(mixing_figures(matrices) if loggers else [], start=1):
            show_image(loggers, HEATMAPS if number == 1 else f"{HEATMAPS}_{number}", pixels_of(figure), step)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):  # for `mhla report`; TensorBoard shows no tensors
                for name, matrix in matrices.items():
                    logger.experiment.add_tensor(MIXING_VALUES + name, _one(matrix), step)


def pixels_of(figure: Figure) -> np.ndarray:
    """Return a figure as uint8 (H, W, 3)."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _one(matrix: torch.Tensor) -> torch.Tensor:
    """Return a mixing matrix in float32 on the CPU; matrices per head are shown by their mean."""
    values = matrix.detach().float().cpu()
    return values.mean(0) if values.ndim == 3 else values


def mixing_figures(matrices: Mapping[str, torch.Tensor]) -> list[Figure]:
    """Draw the matrices of all layers on one scale, at most three rows of four in a figure.

    Those of the attention to a text come last, in figures of their own.
    """
    names = list(matrices)
    text = [name for name in names if READS_TEXT in name]
    names = [name for name in names if name not in text]
    largest = max(float(_one(matrix).max()) for matrix in matrices.values())
    return [
        mixing_figure({name: matrices[name] for name in kind[first : first + _PANELS]}, first, largest)
        for kind in (names, text)
        for first in range(0, len(kind), _PANELS)
    ]


def mixing_figure(
    matrices: Mapping[str, torch.Tensor], first: int = 0, largest: float | None = None
) -> Figure:
    """Draw one panel per layer; matrices per head are shown by their mean.

    Args:
        matrices: by the layer's name.
        first: number of the first of these layers.
        largest: weight at the top of the scale, which begins at 0; None takes the largest of these.
    """
    shown = [_one(matrix) for matrix in matrices.values()]
    largest = max(float(values.max()) for values in shown) if largest is None else largest
    columns = min(_COLUMNS, len(shown))
    rows = math.ceil(len(shown) / columns)
    width, height = 2.7 * columns + 1.1, 2.8 * rows + 0.3  # inches
    figure = Figure(figsize=(width, height))
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    # Margins by hand: Matplotlib's constrained layout takes half a second for two panels.
    figure.subplots_adjust(0.7 / width, 0.55 / height, 1 - 1.2 / width, 1 - 0.4 / height, 0.3, 0.45)
    for panel in panels[len(shown) :]:
        panel.set_axis_off()
    titles = matrix_titles(matrices, first)
    for panel, values, title in zip(panels, shown, titles, strict=False):
        image = panel.imshow(values.numpy(), cmap="viridis", vmin=0, vmax=largest or 1.0)
        panel.set_title(title, fontsize=13)
        panel.set_xlabel("key block", fontsize=11)
        panel.set_ylabel("query block", fontsize=11)
        panel.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        panel.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    bar = figure.add_axes((1 - 0.95 / width, 0.55 / height, 0.16 / width, 1 - 0.95 / height))
    figure.colorbar(image, cax=bar).set_label("weight", fontsize=11)
    return figure
