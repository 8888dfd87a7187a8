"""Padding, documents and columns of the batches that transformers hands to a model."""

from __future__ import annotations

import torch
from torch import Tensor

from mhla_lightning.errors import UserError

LAST_REAL = -1
"""The value of `logits_to_keep` that takes the last real token of each row."""


def real_tokens(attention_mask: Tensor | None) -> Tensor | None:
    """Return the bool mask of real tokens; None if all are real."""
    if attention_mask is None or bool(attention_mask.all()):
        return None
    return attention_mask.bool()


def documents_of(
    position_ids: Tensor | None, tokens: Tensor, mask: Tensor | None, seen: Tensor | None = None
) -> Tensor | None:
    """Return the documents that positions begin; None where a row is one document.

    They are (batch, tokens) int64, counted from 1.

    Args:
        position_ids: (batch, tokens) or (1, tokens); None means those of the tokens.
        tokens: (batch, tokens, ...).
        mask: (batch, tokens) bool; None means all tokens are real.
        seen: (batch,) tokens before these; None means none.

    Raises:
        UserError: positions that are neither those of the tokens nor of documents.
    """
    if position_ids is None:
        return None
    shape = tokens.shape[:2]
    if position_ids.dim() != 2 or position_ids.shape[1] != shape[1] or len(position_ids) not in (1, shape[0]):
        raise UserError("position_ids", f"their shape {tuple(position_ids.shape)} is not {tuple(shape)}")
    positions = position_ids.expand(shape)
    real = torch.ones_like(positions, dtype=torch.bool) if mask is None else mask
    counted = real.cumsum(1) - 1 + (0 if seen is None else seen[:, None])
    if bool(((positions == counted) | ~real).all()):
        return None
    starts = positions == 0
    follows = positions[:, 1:] == positions[:, :-1] + 1
    if (
        mask is not None
        or seen is not None
        or not bool((starts[:, 0] & (starts[:, 1:] | follows).all(1)).all())
    ):
        raise UserError(
            "position_ids",
            "neither count the real tokens of each row from 0 nor, without padding or a cache, begin at 0 "
            "again with each document; the model counts them itself, so leave them out",
        )
    return starts.cumsum(1)


def kept_columns(x: Tensor, keep: int | Tensor, mask: Tensor | None) -> Tensor:
    """Return the columns of x that the argument `logits_to_keep` names.

    Args:
        x: (batch, tokens, channels).
        keep: see the model's forward.
        mask: (batch, tokens) bool, True = real token; None means all are real.
    """
    if isinstance(keep, Tensor):
        return x[:, keep]
    if keep != LAST_REAL:
        return x[:, -keep:] if keep else x
    if mask is None:
        return x[:, -1:]
    last = (mask * torch.arange(mask.shape[1], device=mask.device)).amax(1)
    return x[torch.arange(len(x), device=x.device), last, None]


def ends_real(mask: Tensor | None) -> bool:
    """Return whether the last column of every row is a real token."""
    return mask is None or bool(mask[:, -1].all())
