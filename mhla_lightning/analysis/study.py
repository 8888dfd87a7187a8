"""The attention of a model on some samples: numbers by layer and head, and a few maps."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from mhla_lightning.analysis.measures import TokenPlaces, attention_shares, measure
from mhla_lightning.analysis.watching import AttentionCall, attention_layers, partitions, watching
from mhla_lightning.attention import BlockGrid, MHLACrossAttention
from mhla_lightning.attention.arithmetic import ceil_div
from mhla_lightning.attention.matrix import attention_matrix
from mhla_lightning.errors import UserError
from mhla_lightning.tasks import Task

log = logging.getLogger(__name__)
_PARTS = {1: 16, 2: 4, 3: 4}  # number of axes -> blocks an axis, where no layer has blocks


@dataclass(frozen=True)
class StudyOptions:
    """What is looked at.

    Attributes:
        block_size: tokens a block per axis of the first layer's grid, for `own_block`. None takes each
            layer's own, or those of another layer. Without any it takes a quarter of each axis, or a 16th of
            a row.
        shared_block_size: the same where `block_size` is None, for layers of as many axes.
        queries: raster numbers of the tokens whose maps are kept; None takes three, spread over the tokens.
        max_tokens: of a sample; a matrix holds their square for each head.
    """

    block_size: Sequence[int] | None = None
    shared_block_size: Sequence[int] | None = None
    queries: Sequence[int] | None = None
    max_tokens: int = 4096


@dataclass
class LayerStudy:
    """One layer.

    Attributes:
        attention: its entry, see attention.attention_entries.
        rank_bound: largest rank that the operator's form allows; None where none is known.
        heads: measure -> (heads,) float64, the mean over samples.
        skipped: why the layer has no numbers; None where it has them.
        maps: (heads, queries, tokens), shares of the keys in the attention of the first sample's queries;
            None for a layer of other tokens than the first one's.
        tokens: measured tokens of a sample, the mean over samples.
        block_size: tokens a block per axis. A layer of another grid than the first one's has its own.
    """

    attention: Mapping[str, Any]
    rank_bound: int | None = None
    heads: dict[str, Tensor] = field(default_factory=dict)
    skipped: str | None = None
    maps: Tensor | None = None
    tokens: float = 0.0
    block_size: tuple[int, ...] = ()


@dataclass
class ModelStudy:
    """All layers of a model.

    Attributes:
        layers: in order.
        samples: number of samples looked at.
        tokens: of each sample in the first layer. Of packed rows, those of the longest document.
        grid: token counts per axis of the first layer.
        queries: tokens whose maps are kept, as numbers of the first sample's tokens in raster order.
        shown: (tokens of the maps,) int64, the raster numbers of the keys in the maps.
        reading: number of layers that read a text by MHLA, which are left out.
    """

    layers: list[LayerStudy]
    samples: int = 0
    tokens: list[int] = field(default_factory=list)
    grid: tuple[int, ...] = ()
    queries: list[int] = field(default_factory=list)
    shown: Tensor | None = None
    reading: int = 0


def study(task: Task, samples: Iterable[Mapping[str, Any]], options: StudyOptions) -> ModelStudy:
    """Look into the attention of a task's backbone.

    Args:
        task: with weights, in eval mode, not compiled.
        samples: batches of one sample each, on the task's device.
        options: what is looked at.

    Raises:
        UserError: more tokens than `max_tokens`, a block size of other axes, or a query that is no token;
            a task that does not run its backbone.
    """
    backbone = task.built_backbone()
    layers = attention_layers(backbone)
    reading = sum(isinstance(module, MHLACrossAttention) for module in backbone.modules())
    found = ModelStudy([LayerStudy(layer.entry) for layer in layers], reading=reading)
    visitor = _Visitor(found, options, backbone)
    for sample in samples:
        with torch.no_grad(), watching(backbone, visitor.visit):
            task.run_backbone(sample)
        if len(found.tokens) == found.samples:
            raise UserError("model", f"run_backbone of {type(task).__name__} runs no layer of its backbone")
        found.samples += 1
    for layer in found.layers:
        layer.heads = {name: total / found.samples for name, total in layer.heads.items()}
        layer.tokens /= found.samples
    return found


def check_tokens(tokens: int, options: StudyOptions) -> None:
    """Refuse samples whose matrices are too large. Raises UserError."""
    if tokens > options.max_tokens:
        raise UserError(
            "max_tokens",
            f"a sample has {tokens:,} tokens, and at most {options.max_tokens:,} are looked at: the matrix "
            f"of one head takes {8 * tokens**2 / 1e9:,.1f} GB; raise it if there is room and time",
        )


def block_size_of(sizes: Iterable[Sequence[int]], grid: Sequence[int]) -> tuple[int, ...]:
    """Return the first block size of this grid, else a quarter of each axis, or a 16th of a row."""
    for size in sizes:
        if len(size) == len(grid):
            return tuple(size)
    return tuple(ceil_div(count, _PARTS[len(grid)]) for count in grid)


class _Visitor:
    """Measures every call of an operator and adds it to a study."""

    def __init__(self, found: ModelStudy, options: StudyOptions, model: nn.Module) -> None:
        self.found, self.options, self.model = found, options, model

    def visit(self, call: AttentionCall) -> None:
        layer, tokens = self.found.layers[call.number], call.q.shape[1]
        check_tokens(tokens, self.options)
        grid = tuple(call.context.grid or (tokens,))
        kept = kept_tokens(call)
        if call.number == 0:
            self._begin_sample(call, grid, kept)
        if layer.skipped is not None:
            return
        try:
            matrix = attention_matrix(call.operator, call.q, call.k, call.v, call.context)[0]
        except UserError as error:
            layer.skipped = error.reason or str(error)
            return
        except Exception as error:  # noqa: BLE001  (any error of an operator that is not ours)
            log.debug("layer %d", call.number, exc_info=error)
            layer.skipped = f"{type(call.operator).__name__} failed in float64: {_first_line(error)}"
            return
        matrix = matrix[:, kept][:, :, kept]
        layer.rank_bound = call.operator.rank_bound(grid, call.q.shape[-1])
        if layer.rank_bound is not None:
            layer.rank_bound = min(layer.rank_bound, len(kept))
        if not layer.block_size:
            layer.block_size = self._block_size(call, grid)
        places = token_places(call, grid, kept, layer.block_size)
        for name, values in measure(matrix, places).items():
            layer.heads[name] = layer.heads.get(name, 0) + values.cpu()
        layer.tokens += len(kept)
        if self.found.samples == 0 and torch.equal(kept.cpu(), cast(Tensor, self.found.shown)):
            rows = torch.tensor([int((kept == query).nonzero()) for query in self.found.queries])
            layer.maps = attention_shares(matrix[:, rows.to(matrix.device)]).cpu()

    def _begin_sample(self, call: AttentionCall, grid: tuple[int, ...], kept: Tensor) -> None:
        found = self.found
        found.tokens.append(len(kept))
        if found.samples:
            return
        given = self.options.block_size
        if given is not None and len(given) != len(grid):
            raise UserError(
                "block_size",
                f"found {len(given)} numbers, and a sample's tokens have {len(grid)} axes {grid}",
            )
        found.grid, found.shown = grid, kept.cpu()
        found.queries = chosen_queries(self.options.queries, found.shown.tolist(), grid, call.operator.causal)

    def _block_size(self, call: AttentionCall, grid: tuple[int, ...]) -> tuple[int, ...]:
        """Return those that were asked for, the layer's own, or those of a layer of the same grid."""
        if self.options.block_size is not None and grid == self.found.grid:
            return tuple(self.options.block_size)
        shared = self.options.shared_block_size
        if shared is not None and len(shared) == len(grid) and grid == self.found.grid:
            return tuple(shared)
        own = call.operator.partition(grid)
        return own or block_size_of(partitions(self.model, grid), grid)


def token_places(
    call: AttentionCall, grid: Sequence[int], kept: Tensor, block_size: Sequence[int]
) -> TokenPlaces:
    """Return where the kept tokens of a call are."""
    causal = call.operator.causal
    if causal:
        positions = torch.arange(len(kept), device=kept.device)[:, None]
        return TokenPlaces(positions, positions[:, 0] // block_size[0], causal)
    axes = [torch.arange(count) for count in grid]
    positions = torch.cartesian_prod(*axes).view(math.prod(grid), len(grid)).to(kept.device)
    blocks = BlockGrid(grid, block_size=block_size).block_of_token.to(kept.device)
    return TokenPlaces(positions[kept], blocks[kept], causal)


def kept_tokens(call: AttentionCall) -> Tensor:
    """Return the numbers of the first row's tokens that are measured, int64.

    These are the real tokens. Of a packed row, they are those of its longest document, because no token sees
    another document.
    """
    context, tokens = call.context, call.q.shape[1]
    if not call.operator.causal:
        every = torch.arange(tokens, device=call.q.device)
        return every if context.mask is None else every[context.mask[0]]
    packing = context.packed()
    if packing is None:
        return torch.arange(tokens, device=call.q.device)
    real, run = packing.real[0], packing.run[0]
    longest = run[real].bincount().argmax()
    return (real & (run == longest)).nonzero().squeeze(1)


def chosen_queries(
    given: Sequence[int] | None, tokens: Sequence[int], grid: Sequence[int], causal: bool
) -> list[int]:
    """Return the raster numbers of the queries whose maps are kept.

    Where none is given, they are at a quarter, a half and three quarters of each axis. Causal ones begin at
    half the tokens, where there is much to see.

    Args:
        given: raster numbers; None chooses.
        tokens: raster numbers of the measured tokens.
        grid: token counts per axis.
        causal: whether queries see earlier tokens only.

    Raises:
        UserError: a number that is no measured token of the first sample.
    """
    if given is not None:
        for query in given:
            if query not in tokens:
                raise UserError(
                    "queries", f"{query} is no token of the first sample; it has {tokens[0]} to {tokens[-1]}"
                )
        return list(given)
    if causal:
        wanted = [tokens[round(share * (len(tokens) - 1))] for share in (0.5, 0.75, 1.0)]
    else:
        wanted = []
        for share in (0.25, 0.5, 0.75):
            number = 0
            for count in grid:
                number = number * count + int(share * count)
            wanted.append(min(tokens, key=lambda token: abs(token - number)))
    return list(dict.fromkeys(wanted))


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
