"""Mixing weights by offset between blocks, for any number of blocks (beyond the paper).

An offset is the query block minus the key block, along each axis. Blocks of (2, 3) have 3 x 5 offsets, in the
raster order of (-1..1, -2..2). A larger grid of blocks has larger offsets, and the outermost weights serve
them. So a model takes any resolution with the same block size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def offsets_of(blocks: Sequence[int]) -> int:
    """Return how many offsets there are between blocks, given as counts per axis."""
    return math.prod(2 * count - 1 for count in blocks)


def offset_of_pairs(
    blocks: Sequence[int], known: Sequence[int], device: torch.device | None = None
) -> Tensor:
    """Return the offset between all pairs of blocks, as places in a table of weights.

    Args:
        blocks: blocks per axis.
        known: blocks per axis that the table is made for; larger offsets take its outermost places.
        device: of the result.

    Returns:
        (blocks, blocks) int64, row = query block, column = key block.
    """
    place = torch.zeros(1, 1, dtype=torch.long, device=device)
    for count, most in zip(blocks, known, strict=True):
        number = torch.arange(count, device=device)
        offset = (number[:, None] - number).clamp(1 - most, most - 1) + most - 1
        place = (place[:, None, :, None] * (2 * most - 1) + offset[None, :, None, :]).flatten(2).flatten(0, 1)
    return place


def expand_relative(weight: Tensor, known: Sequence[int], blocks: Sequence[int]) -> Tensor:
    """Return the mixing matrices of weights by offset.

    Args:
        weight: (heads or 1, offsets).
        known: blocks per axis that the weights are made for.
        blocks: blocks per axis of the result.

    Returns:
        (heads or 1, blocks, blocks), row = query block.
    """
    return weight[:, offset_of_pairs(blocks, known, weight.device)]


def average_by_offset(mixing: Tensor, blocks: Sequence[int]) -> Tensor:
    """Average a mixing matrix over all pairs of blocks with the same offset.

    Args:
        mixing: (blocks, blocks) or (heads, blocks, blocks), row = query block.
        blocks: blocks per axis.

    Returns:
        The weights, (heads or 1, offsets).
    """
    matrices = mixing.detach().double().reshape(-1, *mixing.shape[-2:]).flatten(1)
    place = offset_of_pairs(blocks, blocks, mixing.device).flatten()
    offsets = offsets_of(blocks)
    sums = matrices.new_zeros(len(matrices), offsets).index_add(1, place, matrices)
    counts = matrices.new_zeros(offsets).index_add(0, place, matrices.new_ones(len(place)))
    return (sums / counts).to(mixing.dtype)


def offset_deviation(mixing: Tensor, weights: Tensor, blocks: Sequence[int]) -> float:
    """Return the largest difference between a mixing matrix and its weights by offset.

    Args:
        mixing: (blocks, blocks) or (heads, blocks, blocks), row = query block.
        weights: (heads or 1, offsets).
        blocks: blocks per axis of both.
    """
    return float((mixing.detach() - expand_relative(weights, blocks, blocks)).abs().max())
