"""What a backbone makes of others' weights, and where the tokens of a model are.

The place of a token is in no tensor's shape: 8 x 16 and 4 x 32 tokens are 128 rows both. So a model tells it
beside its weights: in the metadata of its state dict, in recipe.yaml, or in the header of an export.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from mhla_lightning.attention import BlockGrid

_KEY = "mhla_geometry"


class DoubtfulWeights(UserWarning):
    """Weights were left out, or taken as they are although their grid is unknown."""


@dataclass(frozen=True)
class Geometry:
    """The token grid of a model, and the blocks of its mixing matrices.

    Attributes:
        grid: tokens per axis; None where it is unknown.
        blocks: the partition that each mixing matrix mixes, by the matrix's name; of a causal model one axis.
            Of a matrix between two sequences that of the queries.
        keys: of a matrix between two sequences the partition of the keys.
        told: whether the caller has given the grid, so that positions that contradict it are a mistake.
    """

    grid: tuple[int, ...] | None = None
    blocks: Mapping[str, BlockGrid] = field(default_factory=dict)
    told: bool = False
    keys: Mapping[str, BlockGrid] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """Return lists and numbers alone, which every file of weights can hold."""
        grid = None if self.grid is None else list(self.grid)
        keys = {"keys": _plain(self.keys)} if self.keys else {}
        return {"grid": grid, "blocks": _plain(self.blocks), **keys}

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Geometry:
        """Return what :meth:`plain` has written."""
        grid = plain["grid"]
        blocks, keys = (
            {name: BlockGrid(tokens, block_size=size) for name, (tokens, size) in found.items()}
            for found in (plain["blocks"], plain.get("keys", {}))
        )
        return cls(None if grid is None else tuple(grid), blocks, keys=keys)


def _plain(blocks: Mapping[str, BlockGrid]) -> dict[str, list[list[int]]]:
    return {name: [list(made.grid), list(made.block_size)] for name, made in blocks.items()}


def note_geometry(module: Any, state: Any, prefix: str, metadata: dict[str, Any]) -> None:
    """Write a module's `geometry` into the metadata of its state dict; a hook of torch."""
    metadata[_KEY] = module.geometry.plain()


def noted_geometry(state: object) -> Geometry | None:
    """Return the geometry that a state dict was written with; None where it has none.

    torch keeps the metadata in `_metadata`, for which it has no public name (2.14).
    """
    for metadata in getattr(state, "_metadata", {}).values():
        if isinstance(metadata, Mapping) and _KEY in metadata:
            return Geometry.of(metadata[_KEY])
    return None


@dataclass(frozen=True)
class ModelFacts:
    """What files tell of the model that their weights belong to.

    Attributes:
        backbone: name in our registry; empty for a model of others.
        attention, options: as for `build_backbone`.
        image: (height, width) in pixels, of a model of timm.
        timm: name that may be one of timm's; empty where there is none.
        mean, std: of the normalisation of its images, one value a channel; empty where nothing tells them.
    """

    backbone: str = ""
    attention: Any = "mhla"
    options: Mapping[str, Any] = field(default_factory=dict)
    image: tuple[int, int] | None = None
    timm: str = ""
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


class WeightState(dict[str, Tensor]):
    """Tensors of a file by name, and what the file tells beside them.

    Attributes:
        geometry: of the model; None where it is unknown.
        facts: of the model; None where the files tell nothing.
        taken: which of several weights these are, in words; empty where there is one choice.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]] = (),
        geometry: Geometry | None = None,
        facts: ModelFacts | None = None,
        taken: str = "",
    ) -> None:
        super().__init__(tensors)
        self.geometry, self.facts, self.taken = geometry, facts, taken


class Adapted(dict[str, Tensor]):
    """Weights under a backbone's own names.

    Attributes:
        resampled: what was resampled, by name: `8 x 16 to 16 x 16 tokens`.
        omitted: why a tensor of the source was left out, by name.
        doubts: what a user must know of tensors left out or taken for granted, by name.
    """

    def __init__(self, tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]] = ()) -> None:
        super().__init__(tensors)
        self.resampled: dict[str, str] = {}
        self.omitted: dict[str, str] = {}
        self.doubts: dict[str, str] = {}

    def omit(self, name: str, reason: str, doubt: bool = True) -> None:
        """Leave a tensor out.

        Args:
            name: of the tensor.
            reason: in words.
            doubt: whether something is lost.
        """
        self.pop(name, None)
        self.omitted[name] = reason
        if doubt:
            self.doubts[name] = reason

    def warnings(self) -> list[str]:
        """Return the doubts, one line for all tensors of the same reason."""
        groups: dict[str, list[str]] = {}
        for name, reason in self.doubts.items():
            groups.setdefault(reason, []).append(name)
        return [
            f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {reason}"
            for reason, names in groups.items()
        ]


def by(counts: Sequence[int]) -> str:
    """Return counts per axis in words: `8 x 16`."""
    return " x ".join(map(str, counts))


@runtime_checkable
class AdaptsWeights(Protocol):
    """A backbone that takes the weights of a model of another geometry.

    Attributes:
        geometry: its own.
    """

    geometry: Geometry

    def adapt_state_dict(self, state: Mapping[str, Tensor], grid: Geometry | None = None) -> Adapted:
        """Return others' weights in this model's places; `grid` tells the geometry of their model."""
        ...
