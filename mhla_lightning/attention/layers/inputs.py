"""What a self-attention layer takes."""

from __future__ import annotations

from torch import Tensor

from mhla_lightning.errors import UserError


def check_tokens(x: Tensor, dim: int) -> None:
    """Refuse a tensor that is not (batch, tokens, dim). Raises UserError."""
    if x.dim() != 3 or x.shape[-1] != dim:
        hint = "; images are x.flatten(2).transpose(1, 2)" if x.dim() > 3 and x.shape[1] == dim else ""
        raise UserError("x", f"its shape is {tuple(x.shape)}; the layer takes (batch, tokens, {dim}){hint}")
