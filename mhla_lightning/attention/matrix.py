"""The attention matrix of an operator: what it makes of the identity as values."""

from __future__ import annotations

import torch
from torch import Tensor

from mhla_lightning.attention.base import Attention
from mhla_lightning.attention.context import Context
from mhla_lightning.errors import UserError

_TOLERANCE = 1e-4  # of the largest output; float32 inside an operator is nearer than that


@torch.no_grad()
def attention_matrix(operator: Attention, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
    """Return the matrix A that gives an operator's output, out = A v, of every sample and head.

    The values are replaced by columns of the identity, as many at once as a head has channels. Everything is
    computed in float64, so that rank and gaps of singular values are those of the operator. The normalizer is
    part of A. Padded queries have rows of 0, and keys that a query does not see have columns of 0.

    Args:
        operator: of a layer, with its weights.
        q, k, v, context: as in :meth:`Attention.forward`.

    Returns:
        (batch, heads, tokens, tokens) float64; row = query, column = key.

    Raises:
        UserError: there is no such matrix, because the output is not linear in v.
    """
    q, k, v = (x.detach().double() for x in (q, k, v))
    batch, tokens, _, width = v.shape
    heads = q.shape[2]
    matrix = q.new_empty(batch, heads, tokens, tokens)
    identity = torch.eye(tokens, dtype=q.dtype, device=q.device)
    for first in range(0, tokens, width):
        columns = identity[:, first : first + width]
        count = columns.shape[1]
        values = torch.zeros_like(v)
        values[..., :count] = columns[None, :, None]
        out = operator(q, k, values, context)
        matrix[..., first : first + count] = out.transpose(1, 2)[..., :count]
    _check(operator, matrix, v, operator(q, k, v, context))
    return matrix


def _check(operator: Attention, matrix: Tensor, v: Tensor, out: Tensor) -> None:
    """Refuse an operator whose output is not its matrix times v. Raises UserError."""
    grouped = matrix.shape[1] // v.shape[2]  # query heads that share a head of k and v
    values = v.repeat_interleave(grouped, dim=2).transpose(1, 2)
    expected = out.transpose(1, 2)
    off = float((matrix @ values - expected).abs().max())
    if not off <= _TOLERANCE * float(expected.abs().max()):  # NaN too
        raise UserError(
            "name",
            f"{type(operator).__name__} has no attention matrix: its output is not linear in v (a matrix is "
            f"off by {off:.2g} at outputs up to {float(expected.abs().max()):.2g})",
        )
