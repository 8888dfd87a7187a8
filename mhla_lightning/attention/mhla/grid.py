"""Tokens on a 1, 2 or 3 axis grid, cut into blocks (SPEC section 0 and 1.5)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mhla_lightning.errors import UserError


class BlockGrid:
    """Cuts a token grid into blocks and moves tensors between raster order and block order.

    Raster order: row-major over the grid, last axis fastest. Block order: blocks row-major over the block
        grid, tokens row-major inside a block.
    The last block of an axis may be short; its missing places are filled with zeros in block order and
    dropped on the way back.

    Args:
        grid: token counts per axis, ``(N,)``, ``(H, W)`` or ``(T, H, W)``.
        blocks: blocks per axis; one number serves every axis. Give this or ``block_size``.
        block_size: tokens of a block per axis; one number serves every axis.

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
            raise UserError(f"a token grid has 1 to 3 axes of at least one token, got {self.grid}")
        if (blocks is None) == (block_size is None):
            raise UserError(
                f"give either blocks or block_size for a grid of {self.grid} tokens, got "
                f"blocks={blocks} and block_size={block_size}"
            )
        if blocks is not None:
            counts = self._per_axis("blocks", blocks)
            self.block_size = tuple(_width(n, count) for n, count in zip(self.grid, counts, strict=True))
        else:
            assert block_size is not None
            self.block_size = tuple(
                min(n, size)
                for n, size in zip(self.grid, self._per_axis("block_size", block_size), strict=True)
            )
        self.blocks = tuple(math.ceil(n / width) for n, width in zip(self.grid, self.block_size, strict=True))
        self.padded = tuple(count * width for count, width in zip(self.blocks, self.block_size, strict=True))
        self.tokens = math.prod(self.grid)
        self.num_blocks = math.prod(self.blocks)
        self.tokens_per_block = math.prod(self.block_size)
        self.even = self.padded == self.grid

    def _per_axis(self, name: str, value: int | Sequence[int]) -> tuple[int, ...]:
        values = (value,) * len(self.grid) if isinstance(value, int) else tuple(value)
        if len(values) != len(self.grid) or any(not isinstance(x, int) or x < 1 for x in values):
            raise UserError(
                f"{name} takes one positive whole number per axis of the {self.grid} token grid, got {value}"
            )
        return values

    def __repr__(self) -> str:
        return f"BlockGrid(grid={self.grid}, blocks={self.blocks}, block_size={self.block_size})"

    @property
    def mask(self) -> Tensor | None:
        """(blocks, tokens_per_block) bool, True where a token stands; None when every block is full."""
        return None if self.even else self.to_blocks(torch.ones(self.tokens, 1, dtype=torch.bool)).squeeze(-1)

    @property
    def block_of_token(self) -> Tensor:
        """(tokens,) int64: the block of every token in raster order."""
        ids = torch.arange(self.num_blocks).view(-1, 1, 1).expand(-1, self.tokens_per_block, 1)
        return self.from_blocks(ids).squeeze(-1)

    def to_blocks(self, x: Tensor) -> Tensor:
        """(..., tokens, channels) in raster order -> (..., blocks, tokens_per_block, channels)."""
        lead = x.dim() - 2
        x = self.split(x, lead).permute(*self._blocks_first(lead))
        return x.reshape(*x.shape[:lead], self.num_blocks, self.tokens_per_block, x.shape[-1])

    def from_blocks(self, x: Tensor) -> Tensor:
        """(..., blocks, tokens_per_block, channels) -> (..., tokens, channels) in raster order."""
        lead = x.dim() - 3
        x = x.reshape(*x.shape[:lead], *self.blocks, *self.block_size, x.shape[-1])
        order = self._blocks_first(lead)
        return self.merge(x.permute(*sorted(range(len(order)), key=order.__getitem__)), lead)

    def split(self, x: Tensor, dim: int) -> Tensor:
        """Opens the token axis `dim` into (count, size) pairs, one an axis of the grid; short last blocks
        are filled with zeros. A view when even.
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
        """The way back from :meth:`split`."""
        for axis, n in enumerate(self.grid):
            x = x.flatten(dim + axis, dim + axis + 1).narrow(dim + axis, 0, n)
        return x.flatten(dim, dim + len(self.grid) - 1)

    def _blocks_first(self, lead: int) -> list[int]:
        """Order of the dimensions of (lead, count, size, count, size, ..., channels) with all counts
        before all sizes.
        """
        counts = [lead + 2 * axis for axis in range(len(self.grid))]
        return [*range(lead), *counts, *(d + 1 for d in counts), lead + 2 * len(self.grid)]

    def distances(self) -> Tensor:
        """(blocks, blocks) float64: Euclidean distance of block positions on the unit-spaced block grid
        (paper Sec. 4.2).
        """
        axes = [torch.arange(count, dtype=torch.float64) for count in self.blocks]
        positions = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(self.num_blocks, -1)
        return (positions[:, None] - positions[None]).pow(2).sum(-1).sqrt()


def _width(tokens: int, count: int) -> int:
    width = math.ceil(tokens / count)
    if math.ceil(tokens / width) == count:
        return width
    fitting = sorted({math.ceil(tokens / size) for size in range(1, tokens + 1)})
    below, above = [n for n in fitting if n < count], [n for n in fitting if n > count]
    near = " or ".join(str(n) for n in below[-1:] + above[:1])
    raise UserError(
        f"blocks={count} does not fit an axis of {tokens} tokens: blocks of {width} tokens make "
        f"{math.ceil(tokens / width)} blocks; use {near}"
    )
