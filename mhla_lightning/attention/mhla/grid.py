"""Tokens on a grid of 1, 2 or 3 axes, cut into blocks (SPEC section 0 and 1.5)."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from mhla_lightning.attention.arithmetic import ceil_div
from mhla_lightning.errors import UserError


class BlockGrid:
    """Cuts a token grid into blocks and moves tensors between raster order and block order.

    Raster order: row-major over the grid, last axis fastest. Block order: blocks row-major over the block
    grid, and tokens row-major inside a block. The last block of an axis may be short: its empty places are
    zeros in block order, and the way back drops them.

    Args:
        grid: token counts per axis, ``(N,)``, ``(H, W)`` or ``(T, H, W)``.
        blocks: blocks per axis; one number serves every axis. Give this or ``block_size``.
        block_size: tokens of a block per axis; one number serves every axis.

    Attributes:
        padded: tokens per axis after filling up short blocks.
        even: whether every block is full.

    Raises:
        UserError: neither or both of blocks and block_size, a wrong number of axes, or a count that does not
            fit the axis.
    """

    def __init__(
        self,
        grid: Sequence[int],
        blocks: int | Sequence[int] | None = None,
        *,
        block_size: int | Sequence[int] | None = None,
    ) -> None:
        self.grid = tuple(int(n) for n in grid)
        if not 1 <= len(self.grid) <= 3 or min(self.grid) < 1:
            raise UserError("grid", f"found {self.grid}; a token grid has 1 to 3 axes of at least one token")
        if (blocks is None) == (block_size is None):
            found = "both" if blocks is not None else "neither"
            raise UserError(
                "blocks",
                f"found {found} of `blocks` ({blocks}) and `block_size` ({block_size}) for a grid of "
                f"{self.grid} tokens; give one of them",
            )
        if blocks is not None:
            counts = self._per_axis("blocks", blocks)
            self.block_size = tuple(_width(n, count) for n, count in zip(self.grid, counts, strict=True))
        else:
            assert block_size is not None
            sizes = self._per_axis("block_size", block_size)
            self.block_size = tuple(min(n, size) for n, size in zip(self.grid, sizes, strict=True))
        self.blocks = tuple(ceil_div(n, width) for n, width in zip(self.grid, self.block_size, strict=True))
        self.padded = tuple(count * width for count, width in zip(self.blocks, self.block_size, strict=True))
        self.tokens = math.prod(self.grid)
        self.num_blocks = math.prod(self.blocks)
        self.tokens_per_block = math.prod(self.block_size)
        self.even = self.padded == self.grid

    def _per_axis(self, key: str, value: int | Sequence[int]) -> tuple[int, ...]:
        values = (value,) * len(self.grid) if isinstance(value, int) else value
        several = isinstance(values, Sequence) and len(values) == len(self.grid)
        if not several or any(not isinstance(x, int) or isinstance(x, bool) or x < 1 for x in values):
            raise UserError(
                key, f"found {value}; give one positive whole number per axis of the {self.grid} token grid"
            )
        return tuple(values)

    def __repr__(self) -> str:
        return f"BlockGrid(grid={self.grid}, blocks={self.blocks}, block_size={self.block_size})"

    @property
    def mask(self) -> Tensor | None:
        """(blocks, tokens_per_block) bool, True where a place holds a token; None when all do."""
        return None if self.even else self.to_blocks(torch.ones(self.tokens, 1, dtype=torch.bool)).squeeze(-1)

    @property
    def block_of_token(self) -> Tensor:
        """(tokens,) int64: the block of every token in raster order."""
        ids = torch.arange(self.num_blocks).view(-1, 1, 1).expand(-1, self.tokens_per_block, 1)
        return self.from_blocks(ids).squeeze(-1)

    @cached_property
    def block_numbers(self) -> array[int]:
        """As `block_of_token`, kept.

        This is no tensor: one that is kept would be of the mode of its first call, such as fake.
        """
        block = [0]
        for tokens, count, size in zip(self.grid, self.blocks, self.block_size, strict=True):
            block = [b * count + place // size for b in block for place in range(tokens)]
        return array("q", block)

    @cached_property
    def pairs(self) -> array[int]:
        """tokens x tokens int64: the place of m[b(i), b(j)] in a flat mixing matrix."""
        return array("q", [i * self.num_blocks + j for i in self.block_numbers for j in self.block_numbers])

    def to_blocks(self, x: Tensor) -> Tensor:
        """Reorder raster order to block order.

        (..., tokens, channels) -> (..., blocks, tokens_per_block, channels).
        """
        lead = x.dim() - 2
        x = self.split(x, lead).permute(*self._blocks_first(lead))
        return x.reshape(*x.shape[:lead], self.num_blocks, self.tokens_per_block, x.shape[-1])

    def from_blocks(self, x: Tensor) -> Tensor:
        """Reorder block order to raster order.

        (..., blocks, tokens_per_block, channels) -> (..., tokens, channels).
        """
        lead = x.dim() - 3
        x = x.reshape(*x.shape[:lead], *self.blocks, *self.block_size, x.shape[-1])
        order = self._blocks_first(lead)
        return self.merge(x.permute(*sorted(range(len(order)), key=order.__getitem__)), lead)

    def split(self, x: Tensor, dim: int) -> Tensor:
        """Split the token axis `dim` into pairs (count, size), one pair per axis of the grid.

        Short last blocks are filled up with zeros. The result is a view when all blocks are full.
        """
        lead, rest = x.shape[:dim], x.shape[dim + 1 :]
        if not self.even:
            padding = [0, 0] * len(rest)
            for n, full in zip(reversed(self.grid), reversed(self.padded), strict=True):
                padding += [0, full - n]
            x = F.pad(x.reshape(*lead, *self.grid, *rest), padding)
        return x.reshape(
            *lead, *(size for pair in zip(self.blocks, self.block_size, strict=True) for size in pair), *rest
        )

    def merge(self, x: Tensor, dim: int) -> Tensor:
        """Undo :meth:`split`."""
        for axis, n in enumerate(self.grid):
            x = x.flatten(dim + axis, dim + axis + 1).narrow(dim + axis, 0, n)
        return x.flatten(dim, dim + len(self.grid) - 1)

    def _blocks_first(self, lead: int) -> list[int]:
        """Return the order of dimensions that puts all counts before all sizes.

        The dimensions are (lead, count, size, count, size, ..., channels).
        """
        counts = [lead + 2 * axis for axis in range(len(self.grid))]
        return [*range(lead), *counts, *(d + 1 for d in counts), lead + 2 * len(self.grid)]

    def distances(self) -> Tensor:
        """Return the Euclidean distances of blocks, (blocks, blocks) float64 (paper Sec. 4.2).

        The unit is one block along an axis.
        """
        axes = [torch.arange(count, dtype=torch.float64) for count in self.blocks]
        positions = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(self.num_blocks, -1)
        return (positions[:, None] - positions[None]).pow(2).sum(-1).sqrt()


def cut_alike(
    made: BlockGrid,
    grid: Sequence[int],
    blocks: int | Sequence[int] | None,
    block_size: int | Sequence[int] | None,
) -> BlockGrid:
    """Return the blocks of another grid, cut by the same options.

    Args:
        made: the blocks that the options gave.
        grid: token counts per axis.
        blocks, block_size: the options.

    Raises:
        UserError: options that do not fit the grid.
    """
    if single_frame(made, grid, blocks):
        return BlockGrid(grid, (1, *made.blocks[1:]))
    return BlockGrid(grid, blocks, block_size=block_size)


def single_frame(made: BlockGrid, grid: Sequence[int], blocks: int | Sequence[int] | None) -> bool:
    """Return whether a grid is a single frame, given to blocks of videos.

    Its blocks are mixed like the first ones in time, as the first frame of a video is.

    Args:
        made: the blocks of videos.
        grid: token counts per axis.
        blocks: the option that gave them; None where `block_size` did.
    """
    return len(grid) == 3 and grid[0] == 1 and blocks is not None and made.blocks[0] > 1


def _width(tokens: int, count: int) -> int:
    """Return the width of `count` blocks on an axis of `tokens`."""
    width = ceil_div(tokens, count)
    if ceil_div(tokens, width) == count:
        return width
    fitting = sorted({ceil_div(tokens, size) for size in range(1, tokens + 1)})
    below, above = [n for n in fitting if n < count], [n for n in fitting if n > count]
    near = [str(n) for n in below[-1:] + above[:1]]
    verb = "counts that work are" if len(near) == 2 else "count that works is"
    raise UserError(
        "blocks",
        f"{count} does not fit an axis of {tokens} tokens: blocks of {width} tokens make "
        f"{ceil_div(tokens, width)} blocks; the nearest {verb} {' and '.join(near)}",
    )
