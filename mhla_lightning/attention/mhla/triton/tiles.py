"""The fixed table of tiles, warps and stages.

There is no autotuning, so ranks agree and bits repeat. Compiled ahead of time for sm_80 and sm_90, no
configuration of 16-bit operands spills (`mhla bench kernels --code`).
"""

from __future__ import annotations

from dataclasses import dataclass

from mhla_lightning.attention.mhla.triton.choice import WHOLE_ROW

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


def whole_row(blocks: int, tokens_per_block: int) -> int | None:
    """Return the rows of a tile that holds all tokens; None where there are too many."""
    padded = blocks * padded_block(tokens_per_block)
    return power_of_two(padded) if padded <= WHOLE_ROW else None


def dense_forward(dim: int, rows: int, itemsize: int) -> Tile:
    """Return the tile of the dense forward.

    Args:
        dim: padded channels, the larger of q's and v's.
        rows: padded tokens of a row.
        itemsize: bytes of an operand.
    """
    if itemsize == 4:
        return Tile(min(64, power_of_two(rows)), min(32, power_of_two(rows)), 4, 1)
    queries, keys = min(128, power_of_two(rows)), min(64, power_of_two(rows))
    return Tile(queries, keys, 8 if dim > 64 and queries > 64 else 4, 2)


def dense_whole_row(dim: int, rows: int, itemsize: int) -> Tile:
    """Return the tile of the backward that finishes a row of padded tokens at once."""
    if itemsize == 4:
        return Tile(rows, LEAST, 8, 1)
    return Tile(rows, min(32, rows), 4 if rows <= 64 else 8 if dim <= 64 else 16, 1)


def dense_backward(dim: int, itemsize: int) -> Tile:
    """Return the tile of the two kernels that share a longer row's backward."""
    if itemsize == 4:
        return Tile(32, 32, 4, 1)
    return Tile(64, 64, 4 if dim <= 64 else 8, 1)


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


def causal_tile(kernel: str, dim: int, rows: int, itemsize: int, major: int) -> Tile:
    """Return the tile of a causal kernel.

    Args:
        kernel: `sum`, `forward` or `backward`.
        dim: padded channels, the larger of q's and v's.
        rows: padded tokens of a chunk, or of a row in the dense form.
        itemsize: bytes of an operand.
        major: compute capability.
    """
    most = 64 if itemsize == 2 else 32
    size = min(most, power_of_two(rows))
    return Tile(size, size, 8 if dim > 64 else 4, 1)


def slices_of(dim_k: int, dim_v: int) -> tuple[int, int]:
    """Return the channels of k that one program of `chunk_sum_kernel` takes, and the programs of a chunk."""
    width = min(dim_k, 128 * 128 // dim_v)
    return width, dim_k // width
