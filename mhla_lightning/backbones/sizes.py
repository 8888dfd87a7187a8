"""The sizes that a model of patches and blocks takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from mhla_lightning.attention import BlockGrid, LayerAttention
from mhla_lightning.errors import UserError

WORDS = {2: "two", 3: "three"}


@runtime_checkable
class TakesSizes(Protocol):
    """A backbone that runs on samples of several sizes; every batch has one of them."""

    def take_sizes(self, sizes: Sequence[Sequence[int]]) -> None:
        """Take samples of these sizes besides those of its own size, with the same weights.

        Args:
            sizes: along each axis of a sample, in pixels of images or latents.

        Raises:
            UserError: a size that the patch or a layer's blocks cannot take; nothing has changed then.
        """
        ...

    def tokens_of(self, size: Sequence[int]) -> tuple[int, ...]:
        """Return the tokens per axis of samples of a size.

        Raises:
            UserError: a size that this backbone does not take.
        """
        ...


class Sizes:
    """The sizes of latents that patches divide and that give every layer its number of blocks.

    Args:
        axes: name of each axis, such as ("height", "width").
        patch_size: latent pixels of a token along each axis.
        input_size: latent pixels along each axis that the layers' blocks are laid out for.
        what: has these sizes, for errors.

    Attributes:
        grid: tokens per axis of input_size.

    Raises:
        UserError: an input_size that the patch does not divide.
    """

    def __init__(
        self,
        axes: Sequence[str],
        patch_size: Sequence[int],
        input_size: Sequence[int],
        what: str = "latents",
    ) -> None:
        self.axes, self.patch_size, self.what = tuple(axes), tuple(patch_size), what
        self._layouts: list[_Layout] = []
        self.grid = self.tokens("input_size", input_size)

    def lay_out(self, layers: Sequence[LayerAttention]) -> None:
        """Take only sizes that give as many blocks in these layers as the input size does.

        A relative mixing with `block_size` serves any number of blocks.

        Args:
            layers: one resolved attention entry a layer.
        """
        found: dict[str, _Layout] = {}
        for spec in layers:
            partition = {
                key: spec.operator[key]
                for key in ("blocks", "block_size")
                if spec.operator.get(key) is not None
            }
            full = spec.operator.get("normalizer") == "slot"  # pairs queries by their place in the block
            free = spec.operator.get("mix_form") == "relative" and "block_size" in partition
            if partition:
                found.setdefault(f"{partition} {full} {free}", _Layout(partition, self.grid, full, free))
        self._layouts = list(found.values())

    def tokens(self, key: str, size: Sequence[int]) -> tuple[int, ...]:
        """Return the tokens per axis of latents of a size.

        Args:
            key: what the size is called in the error.
            size: latent pixels along each axis.

        Raises:
            UserError: a size that the patch does not divide, or that gives another number of blocks than the
                mixing matrix has; the reason names the nearest sizes that work.
        """
        for axis, side in enumerate(size):
            near = self.nearest(axis, side)
            if side not in near:
                layouts = "".join(f" and blocks {layout.blocks}" for layout in self._layouts)
                use = " or ".join(map(str, near))
                if not all(layout.free for layout in self._layouts):
                    use += ", or `mix_form: relative` with `block_size`, which mixes any number of blocks"
                raise UserError(
                    key,
                    f"{self.what} of {tuple(size)} ({', '.join(self.axes)}) do not fit patches of "
                    f"{self.patch_size}{layouts}: {self.axes[axis]} {side}; use {use}",
                )
        return tuple(side // patch for side, patch in zip(size, self.patch_size, strict=True))

    def nearest(self, axis: int, size: int) -> tuple[int, ...]:
        """Return the nearest latent sizes along an axis that work.

        Args:
            axis: its number, as in `axes`.
            size: wanted size.

        Returns:
            `size` alone where it works, else the next below and above it.
        """
        patch = self.patch_size[axis]
        if size > 0 and size % patch == 0 and self._fits(axis, size // patch):
            return (size,)
        down = next((n for n in range((size - 1) // patch, 0, -1) if self._fits(axis, n)), None)
        first = max(1, size // patch + 1)
        last = 2 * first + 4 * self.grid[axis] if self._layouts else first + 1
        up = next((n for n in range(first, last) if self._fits(axis, n)), None)
        return tuple(n * patch for n in (down, up) if n is not None)

    def _fits(self, axis: int, tokens: int) -> bool:
        return all(layout.takes(axis, tokens) for layout in self._layouts)


class _Layout:
    """The blocks of a layer, and the sizes that give the same number of blocks.

    Args:
        partition: blocks or block_size, of the attention entry.
        grid: tokens per axis that the layer was made for.
        full: whether short blocks are refused.
        free: whether the number of blocks may change.
    """

    def __init__(self, partition: Mapping[str, Any], grid: Sequence[int], full: bool, free: bool) -> None:
        made = BlockGrid(grid, **partition)
        self.blocks, self.full, self.free = made.blocks, full, free
        size = partition.get("block_size")
        self.widths = None if size is None else (size,) * len(grid) if isinstance(size, int) else tuple(size)

    def takes(self, axis: int, tokens: int) -> bool:
        """Return whether an axis of `tokens` tokens gives this layout's number of blocks."""
        video = len(self.blocks) == 3
        if video and axis == 0 and tokens == 1 and self.widths is None:  # see grid.single_frame
            return True
        count = self.blocks[axis]
        width = -(-tokens // count) if self.widths is None else min(tokens, self.widths[axis])
        return (self.free or -(-tokens // width) == count) and not (self.full and tokens % width)


def whole_sizes(key: str, size: int | Sequence[int], axes: Sequence[str]) -> tuple[int, ...]:
    """Return one positive whole number for each axis.

    Args:
        key: name of the option, for the error.
        size: the numbers; on two axes one number stands for a square.
        axes: name of each axis.

    Raises:
        UserError: anything else.
    """
    given = (size,) * 2 if isinstance(size, int) and len(axes) == 2 else size
    given = tuple(given) if isinstance(given, Sequence) else ()
    if len(given) != len(axes) or not all(isinstance(n, int) and n > 0 for n in given):
        one = "one whole number or " if len(axes) == 2 else ""
        raise UserError(
            key,
            f"{size} does not fit; give {one}{WORDS[len(axes)]} whole numbers from 1, [{', '.join(axes)}]",
        )
    return given
