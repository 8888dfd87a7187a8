"""The autograd function of all forms of MHLA whose backward is written by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mhla_lightning.attention.base import full_precision
from mhla_lightning.attention.mhla.bidirectional import ReluMHLA
from mhla_lightning.attention.transforms import in_transform, pulled_back


@dataclass(frozen=True)
class WrittenForm:
    """One form.

    Attributes:
        forward: (q, k, v, mixing, settings) -> the output, and the tensors that the backward needs.
        backward: (settings, grad, (q, k, v, mixing, output, *those tensors)) -> the gradients of q, k, v and
            mixing.
    """

    forward: Callable[[Tensor, Tensor, Tensor, Tensor | None, ReluMHLA], tuple[Tensor, tuple[Tensor, ...]]]
    backward: Callable[[ReluMHLA, Tensor, tuple[Tensor, ...]], tuple[Tensor | None, ...]]


class ByHand(torch.autograd.Function):
    """Runs a form; gradients of its gradients are those of the plain operations."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mixing: Tensor | None,
        settings: ReluMHLA,
        form: WrittenForm,
    ) -> Tensor:
        out, kept = form.forward(q, k, v, mixing, settings)
        ctx.save_for_backward(q, k, v, mixing, out, *kept)
        ctx.settings, ctx.form = settings, form
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with full_precision(grad):  # backward may be called under autocast
            if torch.is_grad_enabled() or in_transform(grad):  # gradients of these gradients may be asked for
                gradients = pulled_back(ctx.settings.plain, ctx.saved_tensors[:4], grad)
            else:
                gradients = ctx.form.backward(ctx.settings, grad, ctx.saved_tensors)
        return *gradients, None, None
