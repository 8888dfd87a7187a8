"""Distillation from a frozen teacher of the same sizes with another attention (SPEC 6.7).

Its output and the outputs of its attention layers are the targets.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mhla_lightning.attention import attention_outputs
from mhla_lightning.backbones import build_backbone, known_geometry
from mhla_lightning.errors import UserError, inside
from mhla_lightning.weights.warm_start import InitFrom, start_from, weight_file


@dataclass(frozen=True)
class Distillation:
    """A teacher, and the weights of what a student learns from it beside the data.

    The release's weights are both 0, and it names no others (SPEC 6.7).

    Args:
        teacher: its weights: a file, a folder or a run, or an :class:`InitFrom`.
        attention: its attention entry.
        output: weight of the mean squared error between the two predictions.
        layers: weight of the error between the outputs of the attention layers, a mean over layers.

    Raises:
        UserError: weights that are negative, or both 0. Keys begin with `loss.distill`, the place in a task:
            a recipe's parser builds this object before the task is there to name it.
    """

    teacher: str | InitFrom
    attention: str | dict[str, Any] | list[Any] = "softmax"
    output: float = 1.0
    layers: float = 1.0

    def __post_init__(self) -> None:
        for name, value in (("output", self.output), ("layers", self.layers)):
            if not (math.isfinite(value) and value >= 0):
                raise UserError(
                    f"loss.distill.{name}", f"{value} does not fit; it must be a number of at least 0"
                )
        if not self.output + self.layers:
            raise UserError(
                "loss.distill",
                "its weights `output` and `layers` are both 0, so nothing would be learned from the teacher; "
                "leave it out",
            )


class Lesson:
    """One forward of the student, which the teacher repeats on the same input.

    Args:
        teacher: the frozen model.
    """

    def __init__(self, teacher: nn.Module) -> None:
        self.teacher = teacher
        self.inputs: tuple[Any, ...] = ()
        self.output: Tensor | None = None
        self.layers: list[Tensor] = []

    def losses(self) -> dict[str, Tensor]:
        """Return the mean squared errors `output` and `layers`, float32 scalars."""
        assert self.output is not None, "the student has not run"
        with torch.no_grad(), attention_outputs(self.teacher) as wanted:
            target = self.teacher(*self.inputs)
        errors = [_error(mine, theirs) for mine, theirs in zip(self.layers, wanted, strict=True)]
        return {"output": _error(self.output, target), "layers": torch.stack(errors).mean()}


class Teacher:
    """The teacher of a task.

    It is no part of the task's module: no optimizer, checkpoint or strategy sees it.

    Args:
        config: the teacher's weights and attention, and the weights of the losses.
        backbone, options: of the student; the teacher differs in its attention.

    Raises:
        UserError: no weights there, or an attention that does not fit.
    """

    def __init__(self, config: Distillation, backbone: str, options: Mapping[str, Any]) -> None:
        self.config, self._backbone, self._options = config, backbone, dict(options)
        self.model: nn.Module | None = None
        self._rehearses = False
        with torch.device("meta"):
            self._build()
        weight_file(config.teacher, "teacher")

    def _build(self) -> nn.Module:
        return build_backbone(self._backbone, attention=self.config.attention, **self._options)

    def rehearsal(self, options: Mapping[str, Any]) -> Teacher:
        """Return a copy for a student of other options.

        :meth:`configure` builds it without reading weights.
        """
        twin = copy.copy(self)
        twin._options, twin._rehearses, twin.model = dict(options), True, None
        return twin

    def configure(self) -> None:
        """Build the teacher of a rehearsal; any other waits for :meth:`prepare`."""
        if self._rehearses and self.model is None:
            self.model = self._build().eval().requires_grad_(False)

    def prepare(self, device: torch.device) -> None:
        """Build the teacher with its weights, once, and move it to a device.

        Raises:
            UserError: weights that leave a tensor of the teacher without a value.
        """
        if self.model is None:
            with torch.random.fork_rng(devices=[]):  # the student's dropout must not depend on the teacher
                model = self._build()
            with inside("loss.distill"):
                report = start_from(model, self.config.teacher, "teacher", known_geometry)
            missing = [name for name in report.fresh if model.state_dict()[name].is_floating_point()]
            if missing:
                raise UserError(
                    "loss.distill.teacher",
                    f"{report.source} lacks {len(missing)} tensors of the teacher ({', '.join(missing[:4])})",
                )
            self.model = model.eval().requires_grad_(False)
        self.model.to(device)

    @contextmanager
    def watch(self, student: nn.Module) -> Iterator[Lesson]:
        """Record the input and the outputs of the one forward of the student in the block."""
        assert self.model is not None, "prepare has not run"
        lesson = Lesson(self.model)

        def record(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            lesson.inputs, lesson.output = inputs, output

        handle = student.register_forward_hook(record)
        try:
            with attention_outputs(student) as lesson.layers:
                yield lesson
        finally:
            handle.remove()

    def weigh(self, losses: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted sum of the losses, which is added to the loss of the data."""
        return self.config.output * losses["output"] + self.config.layers * losses["layers"]


def _error(mine: Tensor, theirs: Tensor) -> Tensor:
    return nn.functional.mse_loss(mine.float(), theirs.float())
