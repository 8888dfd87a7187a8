"""Samples of several sizes in one task."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from mhla_lightning.backbones.sizes import TakesSizes
from mhla_lightning.errors import UserError

Size = tuple[int, ...]


def sizes_of(key: str, given: Sequence[int | Sequence[int]] | None, own: Sequence[int]) -> tuple[Size, ...]:
    """Return sizes as (height, width), each once and without the task's own.

    Args:
        key: of the error.
        given: numbers for squares, or pairs; None is none.
        own: the size that the task has anyway.

    Raises:
        UserError: anything else.
    """
    found = [(size, size) if isinstance(size, int) else tuple(size) for size in given or ()]
    for size in found:
        if len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size):
            raise UserError(key, f"{list(size)} is no size; give a number above 0, or [height, width]")
    return tuple(size for size in dict.fromkeys(found) if size != tuple(own))


def size_name(size: Sequence[int]) -> str:
    """Return `64` of a square, else `64x96`, height first."""
    return str(size[0]) if len(set(size)) == 1 else "x".join(map(str, size))


def take_sizes(backbone: nn.Module, name: str, key: str, sizes: Sequence[Size], source: str = "") -> None:
    """Let a backbone take samples of further sizes.

    Args:
        backbone: with or without weights.
        name: of the backbone, for the error.
        key: of the error.
        sizes: along each axis.
        source: where the sizes come from, for the error; empty where the key says it.

    Raises:
        UserError: sizes that it cannot take; names all of them.
    """
    if not sizes:
        return
    of = f" of {source}" if source else ""
    if not isinstance(backbone, TakesSizes):
        raise UserError(key, f"backbone '{name}' takes samples of one size, and not {_listed(sizes)}{of}")
    reasons: dict[Size, str] = {}
    for size in sizes:
        try:
            backbone.tokens_of(size)
        except UserError as error:
            reasons[size] = error.reason or ""
    if reasons:
        raise UserError(
            key, f"the model cannot take {_listed(list(reasons))}{of}: {next(iter(reasons.values()))}"
        )
    try:
        backbone.take_sizes(sizes)
    except UserError as error:
        raise UserError(key, f"the model cannot take {_listed(sizes)}{of}: {error}") from error


def _listed(sizes: Sequence[Size]) -> str:
    return ", ".join(size_name(size) for size in sizes)
