"""The fixed table of tiles, warps and stages.

There is no autotuning, so ranks agree and bits repeat. Compiled ahead of time for sm_80 and sm_90, no launch
of `mhla bench kernels --code` spills; docs/performance.md names other options that do.
"""

from __future__ import annotations

from dataclasses import dataclass

from mhla_lightning.attention.mhla.grid import BlockGrid
from mhla_lightning.attention.mhla.triton.choice import INTERPRETING, CallSizes

WHOLE_ROWS = 128
"""Rows of a call from which on one program a row fills a GPU."""

LEAST = 16  # rows and channels of the smallest matrix product


@dataclass(frozen=True)
class Tile:
    """Sizes of one kernel's program.

    Attributes:
        queries, keys: rows of a tile of queries and of keys.
        warps, stages: of the compiled program.
    """

    queries: int
    keys: int
    warps: int
    stages: int


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least n and LEAST."""
    return max(LEAST, 1 << (n - 1).bit_length())


def padded_block(tokens_per_block: int) -> int:
    """Return the rows that one block takes in a tile of the dense form: a power of two."""
    return 1 << (tokens_per_block - 1).bit_length()


def call_sizes(rows: int, grid: BlockGrid, dim_k: int, dim_v: int, mixed: bool = True) -> CallSizes:
    """Return the sizes that the choice between the forms reads.

    Args:
        rows: batch x heads.
        grid: the blocks.
        dim_k, dim_v: channels a head.
        mixed: False means linear attention, which is one block.
    """
    blocks = grid.num_blocks if mixed else 1
    padded = blocks * padded_block(grid.tokens_per_block if mixed else grid.tokens)
    return CallSizes(rows, grid.tokens, blocks, padded, dim_k, dim_v)


def channel_parts(dim: int) -> tuple[int, int]:
    """Return powers of two whose sum holds the channels: 72 is 64 + 16, and 64 is 64 + 0."""
    whole = power_of_two(dim)
    most, rest = whole // 2, power_of_two(dim - whole // 2)
    return (most, rest) if most >= LEAST and most + rest < whole else (whole, 0)


def dense_forward(dim: int, rows: int, itemsize: int, major: int) -> Tile:
    """Return the tile of the dense forward.

    Args:
        dim: channels with their padding, the larger of q's and v's.
        rows: tokens of a row with the padding of blocks.
        itemsize: bytes of an operand.
        major: compute capability.
    """
    if itemsize == 4:
        return Tile(min(64, power_of_two(rows)), min(32, power_of_two(rows)), 4, 1)
    queries, keys = (
        min(128 if dim <= 64 and major >= 9 else 64, power_of_two(rows)),
        min(64, power_of_two(rows)),
    )
    return Tile(queries, keys, 4, 2)


def dense_backward(dim: int, rows: int, itemsize: int, major: int) -> Tile:
    """Return the tile of the dense backward; see :func:`dense_forward`.

    Before Hopper, operands of products are in registers, which 64 rows overflow.
    """
    small = itemsize == 4 or major < 9
    side = min(32 if small else 64, power_of_two(rows))
    return Tile(side, side, 8 if dim > 64 and not small else 4, 1)


def block_tile(kernel: str, dim: int, tokens_per_block: int, itemsize: int, major: int) -> Tile:
    """Return the tile of a kernel of the block form; `queries` are its tokens.

    Args:
        kernel: `summary`, `read`, `read_backward` or `summary_backward`.
        dim: padded channels, the larger of q's and v's.
        tokens_per_block: tokens of a block.
        itemsize: bytes of a summary's element.
        major: compute capability.
    """
    most = 64 if itemsize == 2 else 32
    if dim > 64 and (itemsize == 4 or (kernel.endswith("backward") and major < 9)):
        most //= 2
    tokens = min(most, power_of_two(tokens_per_block))
    return Tile(tokens, dim, 8 if dim > 64 else 4, 2 if tokens_per_block > tokens else 1)


def causal_tile(
    kernel: str,
    dim: int,
    rows: int,
    itemsize: int,
    major: int,
    *,
    apart: bool = False,
    uneven: bool = False,
) -> Tile:
    """Return the tile of a causal kernel.

    Args:
        kernel: `sum`, `forward`, `queries` or `keys`.
        dim: padded channels, the larger of q's and v's.
        rows: padded tokens of a chunk, or of a row in the dense form.
        itemsize: bytes of an operand.
        major: compute capability.
        apart: whether the normalizer takes other features than the numerator, which rotary turns.
        uneven: whether rotary turns a number of channels that is no power of two.
    """
    small_ones = itemsize == 4 or uneven or (apart and dim > 128 and major < 9)
    most, least = 32 if small_ones else 64, 16 if uneven and apart else 32
    queries = keys = min(most, power_of_two(rows))
    if kernel in ("queries", "keys"):  # their sums leave few registers
        small = min(least, power_of_two(rows))
        queries = small
        keys = keys if kernel == "keys" and dim <= 64 and major >= 9 else small
    elif uneven and not apart and major >= 9:
        keys = LEAST
    return Tile(queries, keys, 8 if dim > 64 else 4, 1)


def slices_of(dim_k: int, dim_v: int) -> tuple[int, int]:
    """Return the channels of k that a program of `chunk_sum_kernel` takes.

    The second number is the programs of a chunk.
    """
    width = min(dim_k, 128 * 128 // dim_v)
    return width, dim_k // width


MOST_MIXED = 128
"""Chunks of the longest row whose means one program mixes; more leave no registers for them."""


def mix_tile(chunks: int, elements: int) -> tuple[Tile, int]:
    """Return the tile that mixes means of chunks, and the tiles of a program.

    Args:
        chunks: of a row.
        elements: of a mean.
    """
    rows = power_of_two(chunks)
    width = min(64 if rows > 64 else 128, power_of_two(elements))
    return Tile(rows, width, 8 if rows > 64 else 4, 2), max(1, min(16, elements // width // 8))


def own_tile(dim_k: int, dim_v: int, rows: int, itemsize: int) -> Tile | None:
    """Return the tile of all gradients of one chunk on Hopper; `keys` are channels of v at once.

    None means that two kernels are needed, as before Hopper, where operands fill the registers.

    Args:
        dim_k, dim_v: channels with their padding.
        rows: padded tokens of a chunk.
        itemsize: bytes of an operand.
    """
    if rows > 64 or itemsize > 2 * (1 + INTERPRETING):
        return None
    return Tile(rows, min(64, dim_v), 8 if rows * dim_k > 2048 else 4, 1)


def decode_tile(dim_k: int, dim_v: int) -> Tile:
    """Return the tile of one token; `queries` are channels of v that a program reads at once.

    A slice of 4,096 elements leaves registers for two programs a processor.

    Args:
        dim_k, dim_v: channels with their padding.
    """
    width = min(dim_v, 4096 // dim_k)
    return Tile(width, width, 8 if dim_k * width >= 4096 else 4, 1)
