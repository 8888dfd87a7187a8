"""Bring others' weights into the places of a backbone: positions and mixing matrices.

Their rows belong to places of a grid, so rows of another grid are resampled, never copied row by row.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mhla_lightning.attention import MHLA, BlockGrid, MHLACrossAttention
from mhla_lightning.attention.mhla.causal_operator import CausalMHLA
from mhla_lightning.attention.mhla.relative import (
    average_by_offset,
    expand_relative,
    offset_deviation,
    offsets_of,
)
from mhla_lightning.backbones.resampling import resampled_mixing, resampled_positions, resampled_reading
from mhla_lightning.errors import UserError
from mhla_lightning.finite import check_finite
from mhla_lightning.weights.adapted import (
    Adapted,
    DoubtfulWeights,
    Geometry,
    WeightState,
    by,
    note_geometry,
    noted_geometry,
)

Grid = Sequence[int] | Geometry | None
"""What a caller tells of the source: its token grid, all of its geometry, or nothing."""

_TELL = "name it with `grid`, such as"
_PREFIXES = ("cls_token", "dist_token", "reg_token")


def remember_geometry(model: Any) -> None:
    """Keep a model's geometry, and write it into the metadata of every state dict.

    Args:
        model: a backbone with `grid`.
    """
    blocks: dict[str, BlockGrid] = {}
    keys: dict[str, BlockGrid] = {}
    for name, module in model.named_modules():
        if isinstance(module, MHLA):
            blocks[f"{name}.mixing.weight"] = module.grid
        elif isinstance(module, MHLACrossAttention):
            blocks[f"{name}.mixing.weight"] = module.queries
            keys[f"{name}.mixing.weight"] = module.keys
        elif isinstance(module, CausalMHLA):
            size = module.rule.chunk_size
            blocks[f"{name}.mixing.weight"] = BlockGrid((size * module.mixing.blocks,), block_size=size)
    model.geometry = Geometry(tuple(model.grid), blocks, keys=keys)
    model.register_state_dict_post_hook(note_geometry)


def source_geometry(state: Mapping[str, Tensor], grid: Grid = None) -> Geometry:
    """Return all that is known of the geometry of the model that a state belongs to.

    Args:
        state: the tensors; a :class:`WeightState` may name the geometry.
        grid: what the caller tells; it takes precedence.

    Raises:
        UserError: a grid that is none.
    """
    if isinstance(grid, Geometry):
        return grid
    found = noted_geometry(state) or Geometry()
    if isinstance(state, WeightState) and state.geometry is not None:
        found = state.geometry
    if found.grid is None and any(".piece_attn." in name for name in state):
        found = _of_the_release(state)
    if grid is None:
        return found
    if not all(isinstance(count, int) and count > 0 for count in grid) or not 1 <= len(grid) <= 3:
        raise UserError("grid", f"{grid} is no token grid; give the tokens per axis, such as [14, 14]")
    return replace(found, grid=tuple(grid), told=True)


def _of_the_release(state: Mapping[str, Tensor]) -> Geometry:
    """Return the geometry of weights of the MHLA authors' images: all their grids are square."""
    blocks: dict[str, BlockGrid] = {}
    for name, value in state.items():
        side = math.isqrt(len(value)) if value.dim() else 0
        if ".piece_attn.conv." in name and side**2 == len(value):
            ours = name.replace(".piece_attn.conv.", ".attention.mixing.")
            blocks[ours] = BlockGrid((side, side), block_size=1)
    position = state.get("pos_embed")
    side = 0 if position is None else math.isqrt(position.shape[1])
    square = position is not None and side**2 == position.shape[1]
    return Geometry((side, side) if square else None, blocks)


def adapted_to(
    model: Any,
    tensors: Mapping[str, Tensor],
    source: Geometry,
    positions: Collection[str] = (),
    patches: tuple[str, Sequence[str]] | None = None,
    class_token: bool = False,
) -> Adapted:
    """Return tensors in the places of a model.

    Positions and mixing matrices of another grid are resampled where the source's grid is known; else they
    are left out. A warning names what was left out or taken for granted.

    Args:
        model: a backbone with `geometry`, or one without positions.
        tensors: by the model's names; an :class:`Adapted` is changed and returned.
        source: the geometry of their model.
        positions: names of learned positions, (1, tokens, channels).
        patches: name of the patch embedding's weight, and those of the output layer, whose rows are the
            numbers of a patch; None where no output is one.
        class_token: whether the model's positions begin with that of a class token.

    Raises:
        UserError: a grid that is not that of the positions; a tensor of the model that is not finite.
    """
    adapted = tensors if isinstance(tensors, Adapted) else Adapted(tensors)
    own: Geometry = getattr(model, "geometry", Geometry())
    prefix = sum(tensors[name].shape[-2] for name in _PREFIXES if name in tensors and tensors[name].dim() > 1)
    for name in positions:
        if name in tensors and tensors[name].dim() == 3:
            table = tensors[name]
            _place_positions(adapted, name, source, own.grid or (), prefix)
            if class_token and name in adapted:
                _keep_class_row(adapted, name, table, math.prod(source.grid or own.grid or ()))
    for name, target in own.blocks.items():
        if name in tensors and name in own.keys:
            theirs = source.blocks.get(name, target), source.keys.get(name, own.keys[name])
            _place_reading(adapted, name, theirs, (target, own.keys[name]))
        elif name in tensors:
            _place_mixing(adapted, name, source.blocks.get(name), target, _own(model, name))
    if patches is not None:
        _omit_other_patches(adapted, *patches, model)
    needed = {
        name: (value, own_tensor)
        for name, value in adapted.items()
        if (own_tensor := _own(model, name)) is not None
    }
    for name, (value, place) in needed.items():
        if place.is_floating_point() and not value.is_floating_point():
            kind = str(value.dtype).removeprefix("torch.")
            adapted.omit(name, f"its numbers are {kind}, as of quantised weights")
    check_finite({name: value for name, (value, _) in needed.items()}, "state")
    for text in adapted.warnings():
        warnings.warn(text, DoubtfulWeights, stacklevel=3)
    return adapted


def _place_positions(
    adapted: Adapted, name: str, source: Geometry, target: Sequence[int], prefix: int
) -> None:
    """Resample one table of positions; class tokens come before the grid.

    Args:
        adapted: holds it.
        name: of the table.
        source: whose grid it is.
        target: of the model.
        prefix: number of class, distillation and register tokens that the source has.
    """
    table, grid = adapted[name], source.grid
    rows = table.shape[1]
    if grid is not None and (len(grid) != len(target) or rows - math.prod(grid) not in {0, 1, 2, prefix}):
        if source.told:
            raise UserError(
                "grid", f"{by(grid)} tokens do not make the {rows} rows of {name} (class tokens included)"
            )
        grid = None
    if grid is None:
        square = len(set(target)) == 1
        if rows - prefix == math.prod(target) and square:
            adapted[name] = table[:, prefix:]
            adapted.doubts[name] = (
                f"nothing tells its token grid, and its {rows - prefix} tokens are taken as the "
                f"{by(target)} of this model; {_TELL} {list(target)}"
            )
        else:
            side = math.isqrt(rows - prefix)
            example = [side, side] if side**2 == rows - prefix else list(target)
            adapted.omit(
                name,
                f"nothing tells the token grid of its {rows} rows, so the {by(target)} positions here are "
                f"new; {_TELL} {example}",
            )
        return
    before = rows - math.prod(grid)
    adapted[name] = table[:, before:] if before else table
    if tuple(grid) != tuple(target):
        adapted[name] = resampled_positions(adapted[name], grid, target)
        adapted.resampled[name] = f"{by(grid)} to {by(target)} tokens"


def _keep_class_row(adapted: Adapted, name: str, table: Tensor, tokens: int) -> None:
    """Put the position of the class token back before those of the grid.

    Args:
        adapted: holds the positions of the model's grid.
        name: of the positions.
        table: of the source, the class token's row first.
        tokens: of the source's grid.
    """
    if table.shape[1] > tokens:
        adapted[name] = torch.cat([table[:, :1], adapted[name]], dim=1)
    else:
        adapted.resampled.pop(name, None)
        adapted.omit(name, "it has no row for the class token of this model")


def _place_mixing(
    adapted: Adapted, name: str, source: BlockGrid | None, target: BlockGrid, own: Tensor | None
) -> None:
    """Bring one mixing matrix to other blocks or to the other form, or leave it out.

    Args:
        adapted: holds it.
        name: of the matrix.
        source: the blocks that it mixes; None where nothing tells them.
        target: blocks of the model.
        own: the model's matrix.
    """
    value = adapted[name]
    if source is not None and not _mixes(value, source):
        source = None
    if source is None:
        if not _mixes(value, target):
            return
        if len(target.blocks) > 1 and target.num_blocks > 1:
            adapted.doubts[name] = (
                f"nothing tells the layout of its {target.num_blocks} blocks, which are taken as the "
                f"{by(target.blocks)} of this model"
            )
        source = target
    if len(source.blocks) != len(target.blocks):
        adapted.omit(
            name, f"it mixes blocks on {len(source.blocks)} axes, and this model has {len(target.blocks)}"
        )
    elif own is not None and (_is_relative(own, target) or _is_relative(value, source)):
        _place_by_offset(adapted, name, source, target, own)
    elif len(target.blocks) == 1:  # of a causal model, whose chunks are counted from the first token
        if source.block_size != target.block_size:
            adapted.omit(
                name, f"its chunks are {by(source.block_size)} tokens, and here {by(target.block_size)}"
            )
    elif source.blocks != target.blocks and value.dim() in (2, 3):
        adapted[name] = resampled_mixing(value, source, target)
        adapted.resampled[name] = f"{by(source.blocks)} to {by(target.blocks)} blocks"


def _place_by_offset(adapted: Adapted, name: str, source: BlockGrid, target: BlockGrid, own: Tensor) -> None:
    """Place a mixing matrix of weights by offset, or in a model that has such weights.

    Blocks of the same size keep their offsets. Blocks of another size keep their places in the image.
    """
    value, deviation = adapted[name], 0.0
    given, wanted = _is_relative(value, source), _is_relative(own, target)
    same = source.block_size == target.block_size
    if given and wanted and same and source.blocks == target.blocks:
        return
    if same:
        if not given:
            weights = average_by_offset(value, source.blocks)
            deviation = offset_deviation(value, weights, source.blocks)
            value = weights
        value = expand_relative(value, source.blocks, target.blocks)
    else:
        value = expand_relative(value, source.blocks, source.blocks) if given else value
        value = resampled_mixing(value, source, target)
    if wanted:
        weights = average_by_offset(value, target.blocks)
        deviation = max(deviation, offset_deviation(value, weights, target.blocks))
        value = weights
    elif own.dim() == 2 and len(value) == 1:
        value = value[0]
    adapted[name] = value.expand(own.shape).clone() if len(value) == 1 else value
    adapted.resampled[name] = f"{by(source.blocks)} to {by(target.blocks)} blocks"
    if wanted and deviation > 0:
        adapted.resampled[name] += f", averaged by offset, which changes weights by up to {deviation:.2g}"


def _place_reading(
    adapted: Adapted, name: str, source: tuple[BlockGrid, BlockGrid], target: tuple[BlockGrid, BlockGrid]
) -> None:
    """Bring a mixing matrix between tokens and a text to other blocks, or leave it out.

    Args:
        adapted: holds it.
        name: of the matrix.
        source: the blocks of tokens and of text that it mixes.
        target: those of the model.
    """
    value, changes = adapted[name], []
    if value.shape[-2:] != tuple(blocks.num_blocks for blocks in source):
        adapted.omit(name, "nothing tells the blocks that it mixes")
        return
    for theirs, ours, word in zip(source, target, ("tokens", "text"), strict=True):
        if len(theirs.blocks) != len(ours.blocks):
            axes = f"{len(theirs.blocks)} axes of the {word}, and this model has {len(ours.blocks)}"
            adapted.omit(name, f"it mixes blocks on {axes}")
            return
        if theirs.blocks != ours.blocks or (word == "text" and theirs.block_size != ours.block_size):
            changes.append(f"{by(theirs.blocks)} to {by(ours.blocks)} blocks of the {word}")
    if changes:
        adapted[name] = resampled_reading(value, source, target)
        adapted.resampled[name] = " and ".join(changes)


def _mixes(value: Tensor, blocks: BlockGrid) -> bool:
    """Return whether a tensor has the size of a mixing matrix of these blocks, of either form."""
    return value.shape[-1:] == (blocks.num_blocks,) or _is_relative(value, blocks)


def _is_relative(value: Tensor, blocks: BlockGrid) -> bool:
    """Return whether a tensor has one weight per offset between these blocks."""
    offsets = offsets_of(blocks.blocks)
    if value.dim() != 2 or value.shape[1] != offsets:
        return False
    # One block has one offset: several rows are then heads. Causal models have one axis and no offsets.
    return offsets != blocks.num_blocks or (len(value) > 1 and len(blocks.blocks) > 1)


def _own(model: nn.Module, name: str) -> Tensor | None:
    """Return a model's tensor by its name; None where it has none."""
    path, _, leaf = name.rpartition(".")
    try:
        value = getattr(model.get_submodule(path), leaf, None)
    except AttributeError:
        return None
    return value if isinstance(value, Tensor) else None


def _omit_other_patches(adapted: Adapted, patches: str, heads: Sequence[str], model: nn.Module) -> None:
    """Leave out the output layer of a model whose patches have another size.

    4 x 4 pixels of 4 channels are as many numbers as 2 x 2 of 16.
    """
    place = _own(model, patches)
    if patches not in adapted or place is None or adapted[patches].shape == place.shape:
        return
    theirs, own = tuple(adapted[patches].shape), tuple(place.shape)
    for name in heads:
        if name in adapted:
            adapted.omit(name, f"its patches are {by(theirs[1:])}, and here {by(own[1:])}")
