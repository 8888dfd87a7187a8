"""What is checked: an operator of a class, its inputs, and how close two results must be."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mhla_lightning.attention.base import Attention, CausalAttention
from mhla_lightning.attention.context import Context
from mhla_lightning.attention.entry import construct

GRID = (4, 6)
TOKENS = GRID[0] * GRID[1]
ODD_TOKENS = TOKENS - 2  # no multiple of a chunk
Inputs = dict[str, Any]
"""The keywords of a call: q, k and v, and the decays and betas of an operator that needs them."""


class Broken(Exception):
    """The operator breaks a rule."""


class NotChecked(Exception):
    """The rule cannot be checked on this operator."""


@dataclass(frozen=True)
class Subject:
    """An operator class with options.

    Args:
        kind: the class.
        options: its own keys in an attention entry.
        dtype: of the inputs: float64, or float32 where an operator or device has no other.
        device: of the inputs.
        reference: the same result by a dense matrix, called as `reference(operator, context, **inputs)`;
            None asks the operator itself (:meth:`Attention.dense`).
        heads, dim_k, dim_v: sizes.
    """

    kind: type[Attention]
    options: Mapping[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64
    device: str = "cpu"
    reference: Callable[..., Tensor | None] | None = None
    heads: int = 2
    dim_k: int = 4
    dim_v: int = 6

    def build(self, grid: Sequence[int] = GRID, dtype: torch.dtype | None = None) -> Attention:
        """Build the operator; its parameters are drawn, so that none is symmetric or 0."""
        torch.manual_seed(0)
        sizes = {"heads": self.heads, "dim_k": self.dim_k, "dim_v": self.dim_v}
        operator = construct(self.kind, self.options, grid=tuple(grid), **sizes)
        for parameter in operator.parameters():
            torch.nn.init.uniform_(parameter, 0.1, 1.0)
        return operator.to(device=self.device, dtype=dtype or self.dtype)

    def build_causal(self) -> CausalAttention:
        """Build the operator as a causal one."""
        operator = self.build((TOKENS,))
        assert isinstance(operator, CausalAttention)
        return operator

    def inputs(self, operator: Attention, tokens: int = TOKENS, batch: int = 2) -> Inputs:
        """Draw inputs that need gradients."""
        generator = torch.Generator().manual_seed(1)
        made = {
            name: torch.randn(batch, tokens, self.heads, dim, dtype=self.dtype, generator=generator)
            for name, dim in zip("qkv", (self.dim_k, self.dim_k, self.dim_v), strict=True)
        }
        if isinstance(operator, CausalAttention):
            shape = (batch, tokens, self.heads)
            if operator.token_decay:
                channels = (self.dim_k,) if operator.channel_decay else ()
                made["log_decay"] = -torch.rand(*shape, *channels, dtype=self.dtype, generator=generator)
            if operator.token_beta:
                made["beta"] = torch.rand(shape, dtype=self.dtype, generator=generator)
        return {name: x.to(self.device).requires_grad_() for name, x in made.items()}

    def dense(self, operator: Attention, x: Inputs, mask: Tensor | None = None) -> Tensor | None:
        """Return the dense result; None where there is none."""
        others = {name: x[name] for name in x.keys() - {"q", "k", "v"}}
        context = Context(mask=mask, **others)
        q, k, v = x["q"], x["k"], x["v"]
        return (
            operator.dense(q, k, v, context)
            if self.reference is None
            else self.reference(operator, q, k, v, context)
        )

    def close(self, actual: Tensor, expected: Tensor, what: str, factor: float = 1.0) -> None:
        """Compare relative to the largest value.

        Raises:
            Broken: the shapes differ, or a value is further away than rounding explains.
        """
        actual, expected = actual.detach(), expected.detach()
        if actual.shape != expected.shape:
            raise Broken(f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
        if not torch.isfinite(actual).all():
            raise Broken(f"{what}: values that are not finite")
        within = factor * (1e-10 if self.dtype == torch.float64 else 1e-5)
        largest = float(expected.abs().max()) if expected.numel() else 0.0
        off = float((actual - expected).abs().max()) if expected.numel() else 0.0
        if off > within * max(largest, 1e-30):
            raise Broken(f"{what}: off by {off:.2g} at values up to {largest:.2g}")

    def same_gradients(self, operator: Attention, x: Inputs, actual: Tensor, expected: Tensor) -> None:
        """Compare the gradients of two outputs, of all inputs and parameters.

        Raises:
            Broken: names the first that differs.
        """
        wanted = {**x, **{name: p for name, p in operator.named_parameters() if p.requires_grad}}
        draw = torch.Generator().manual_seed(2)
        along = torch.randn(actual.shape, dtype=torch.float64, generator=draw).to(actual)
        pair = [
            torch.autograd.grad(out, list(wanted.values()), along, allow_unused=True, materialize_grads=True)
            for out in (actual, expected)
        ]
        for name, mine, theirs in zip(wanted, *pair, strict=True):
            self.close(mine, theirs, f"gradient of {name}", 10)


def cut(x: Inputs, start: int | None, stop: int | None) -> Inputs:
    """Return some tokens of the inputs."""
    return {name: value[:, start:stop] for name, value in x.items()}


def rows(x: Inputs, start: int, stop: int) -> Inputs:
    """Return some samples of the inputs."""
    return {name: value[start:stop] for name, value in x.items()}


def loud(x: Inputs, mask: Tensor, value: float) -> Inputs:
    """Return the inputs with another value at padded tokens."""
    return {
        name: torch.where(mask.view(*mask.shape, *[1] * (one.dim() - 2)), one, value)
        for name, one in x.items()
    }
