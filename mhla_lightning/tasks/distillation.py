"""A frozen teacher of the same sizes with another attention: its output and its attention layers' outputs
as targets (SPEC 6.7).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from mhla_lightning.attention import attention_outputs
from mhla_lightning.backbones import Backbone, build_backbone
from mhla_lightning.errors import UserError
from mhla_lightning.weights.warm_start import load_matching, read_weights, weight_file


@dataclass(frozen=True)
class Distillation:
    """What a student learns from a teacher beside the data. The release's weights are 0 both, and it names no
    others (SPEC 6.7).

    Args:
        teacher: its weights: a file, a folder or a run.
        attention: its attention entry.
        output: weight of the mean squared error between the two predictions.
        layers: weight of that between the outputs of the attention layers, a mean over layers.

    Raises:
        UserError: weights that are negative, or both 0.
    """

    teacher: str
    attention: str | dict[str, Any] | list[Any] = "softmax"
    output: float = 1.0
    layers: float = 1.0

    def __post_init__(self) -> None:
        for name in ("output", "layers"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise UserError(f"model.distill.{name} is {value}; it must be a number of at least 0")
        if not self.output + self.layers:
            raise UserError(
                "model.distill.output and model.distill.layers are both 0: nothing would be learned "
                "from the teacher; leave distill out"
            )


class Lesson:
    """One forward of the student that the teacher repeats on the same input."""

    def __init__(self, teacher: nn.Module) -> None:
        self.teacher = teacher
        self.inputs: tuple[Any, ...] = ()
        self.output: Tensor | None = None
        self.layers: list[Tensor] = []

    def losses(self) -> dict[str, Tensor]:
        """Mean squared errors, `output` and `layers`, float32 scalars."""
        assert self.output is not None, "the student has not run"
        with torch.no_grad(), attention_outputs(self.teacher) as wanted:
            target = self.teacher(*self.inputs)
        errors = [_error(mine, theirs) for mine, theirs in zip(self.layers, wanted, strict=True)]
        return {"output": _error(self.output, target), "layers": torch.stack(errors).mean()}


class Teacher:
    """The teacher of a task. It is no part of the task's module: no optimizer, checkpoint or strategy sees
    it.

    Args:
        config: what is learned from whom.
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
        try:
            weight_file(config.teacher)
        except UserError as error:
            raise UserError(str(error).replace("model.init_from", "model.distill.teacher")) from error

    def _build(self) -> nn.Module:
        return build_backbone(self._backbone, attention=self.config.attention, **self._options)

    def rehearsal(self, options: Mapping[str, Any]) -> Teacher:
        """A copy for a student of other options, which :meth:`configure` builds without reading weights."""
        twin = copy.copy(self)
        twin._options, twin._rehearses, twin.model = dict(options), True, None
        return twin

    def configure(self) -> None:
        """Builds a rehearsal's teacher. Any other waits for :meth:`prepare`."""
        if self._rehearses and self.model is None:
            self.model = self._build().eval().requires_grad_(False)

    def prepare(self, device: torch.device) -> None:
        """Builds the teacher with its weights, once.

        Raises:
            UserError: weights that leave a tensor of the teacher without a value.
        """
        if self.model is None:
            with torch.random.fork_rng(devices=[]):  # the student's dropout is not to depend on the teacher
                model = self._build()
            path, state = read_weights(self.config.teacher)
            report = load_matching(model, cast(Backbone, model).adapt_state_dict(state), path)
            missing = [name for name in report.fresh if model.state_dict()[name].is_floating_point()]
            if missing:
                raise UserError(
                    f"model.distill.teacher: {path} lacks {len(missing)} tensors of the teacher "
                    f"({', '.join(missing[:4])})"
                )
            self.model = model.eval().requires_grad_(False)
        self.model.to(device)

    @contextmanager
    def watch(self, task: nn.Module) -> Iterator[Lesson]:
        """Takes down the one forward of the task's backbone inside."""
        student = cast(nn.Module, task.backbone)
        assert self.model is not None, "prepare has not run"
        lesson = Lesson(self.model)

        def take_down(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            lesson.inputs, lesson.output = inputs, output

        handle = student.register_forward_hook(take_down)
        try:
            with attention_outputs(student) as lesson.layers:
                yield lesson
        finally:
            handle.remove()

    def weigh(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The sum that is added to the loss of the data."""
        return self.config.output * losses["output"] + self.config.layers * losses["layers"]


def _error(mine: Tensor, theirs: Tensor) -> Tensor:
    return nn.functional.mse_loss(mine.float(), theirs.float())
