"""Resampling of what belongs to places of a grid: positions and mixing matrices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mhla_lightning.attention import BlockGrid


def resampled_positions(table: Tensor, grid: Sequence[int], target: Sequence[int]) -> Tensor:
    """Resample positions of one grid of two axes to another: bicubic, antialiased, as timm does.

    timm's own function takes equal counts of another shape as they are.

    Args:
        table: (1, rows x columns, channels), of `grid`.
        grid, target: (rows, columns).
    """
    image = table.float().unflatten(1, tuple(grid)).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=tuple(target), mode="bicubic", antialias=True)
    return image.flatten(2).transpose(1, 2).to(table.dtype)


def resampled_mixing(mixing: Tensor, source: BlockGrid, target: BlockGrid) -> Tensor:
    """Resample a mixing matrix linearly between the centres of blocks, rows and columns.

    A weight between two places of the image stays: block summaries are sums over tokens, so that no other
    scale is needed.

    Args:
        mixing: (..., blocks, blocks), row = query block.
        source, target: the partitions, of as many axes.
    """
    weights = _shares(source, target).to(mixing.device)
    return (weights @ mixing.double() @ weights.T).to(mixing.dtype)


def resampled_reading(
    mixing: Tensor, source: tuple[BlockGrid, BlockGrid], target: tuple[BlockGrid, BlockGrid]
) -> Tensor:
    """Resample a mixing matrix between tokens and a text, as :func:`resampled_mixing` does.

    Tokens keep their places in the image, rows of a text their numbers.

    Args:
        mixing: (..., query blocks, key blocks).
        source, target: the partitions of tokens and text, of as many axes.
    """
    rows = _shares(source[0], target[0]).to(mixing.device)
    columns = _shares(source[1], target[1], of_the_axis=False).to(mixing.device)
    return (rows @ mixing.double() @ columns.T).to(mixing.dtype)


def _shares(source: BlockGrid, target: BlockGrid, of_the_axis: bool = True) -> Tensor:
    """Return the shares of source blocks in target blocks.

    Args:
        source, target: the partitions, of as many axes.
        of_the_axis: whether a place is a share of its axis, else it is a number of tokens.

    Returns:
        (target blocks, source blocks) float64.
    """
    weights = torch.ones(1, 1, dtype=torch.float64)
    for axis in range(len(target.blocks)):
        known, wanted = (
            _centres(blocks, axis) * (1 if of_the_axis else blocks.grid[axis]) for blocks in (source, target)
        )
        weights = torch.kron(weights, _between(known, wanted))
    return weights


def _centres(blocks: BlockGrid, axis: int) -> Tensor:
    """Return the centre of each block along an axis, as a share of the axis."""
    tokens, width = blocks.grid[axis], blocks.block_size[axis]
    first = torch.arange(blocks.blocks[axis], dtype=torch.float64) * width
    return (first + (first + width).clamp_max(tokens)) / 2 / tokens


def _between(known: Tensor, wanted: Tensor) -> Tensor:
    """Return the weights of linear interpolation, (wanted, known).

    Beyond the ends the nearest counts.
    """
    if len(known) == 1:
        return torch.ones(len(wanted), 1, dtype=torch.float64)
    right = torch.searchsorted(known, wanted).clamp(1, len(known) - 1)
    share = ((wanted - known[right - 1]) / (known[right] - known[right - 1])).clamp(0, 1)
    weights = torch.zeros(len(wanted), len(known), dtype=torch.float64)
    rows = torch.arange(len(wanted))
    weights[rows, right - 1], weights[rows, right] = 1 - share, share
    return weights
