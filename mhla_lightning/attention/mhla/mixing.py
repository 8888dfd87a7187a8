"""The learned matrix that mixes block summaries (paper Eq. 4 and Sec. 4.2; SPEC 1.2 to 1.4)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mhla_lightning.attention.mhla.grid import BlockGrid
from mhla_lightning.errors import UserError, unknown_name


def _linear(distance: Tensor, largest: Tensor) -> Tensor:
    return 1 - distance / largest


def _rows(weight: Tensor) -> Tensor:
    return weight / weight.sum(1, keepdim=True)


def _columns(weight: Tensor) -> Tensor:
    return weight / weight.sum(0, keepdim=True)


def _causal_uniform(distance: Tensor) -> Tensor:
    return _rows(torch.ones_like(distance).tril())


def initial_mixing(distance: Tensor, init: str, *, exp_sigma: float = 3.0, local_thres: float = 1.5, value: float = 1e-6) -> Tensor:
    """The initial mixing matrix, (blocks, blocks): row = query block, column = key block.

    Args:
        distance: (blocks, blocks), ``BlockGrid.distances()``.
        init: a name of ``MIX_INITS``. `local_row` is the paper's (Sec. 4.2); the release has `linear`, `cos`, `exp`, `gaussian`, `local`, `const`.
        exp_sigma: decay length of `exp`, in blocks.
        local_thres: radius of `local`, in blocks.
        value: the entry of `const`.

    Raises:
        UserError: unknown name.
    """
    makers: dict[str, Callable[[Tensor], Tensor]] = {
        "local_row": lambda d: _rows(_linear(d, d.amax(1, keepdim=True))),
        "linear": lambda d: _columns(_linear(d, d.max())),
        "cos": lambda d: _columns(torch.cos(d / d.max() * math.pi / 4)),
        "exp": lambda d: _columns(torch.exp(-d / exp_sigma)),
        "gaussian": lambda d: torch.exp(-d.square() / (2 * (d.max() / 3).square())),
        "local": lambda d: _columns((d <= local_thres).to(d.dtype)),
        "uniform": lambda d: _rows(torch.ones_like(d)),
        "causal_uniform": _causal_uniform,
        "const": lambda d: torch.full_like(d, value),
    }
    if init not in makers:
        raise UserError(unknown_name("mix_init", init, makers))
    if len(distance) == 1 and init != "const":  # every rule divides by the largest distance, 0 here (SPEC P8)
        return torch.ones_like(distance)
    return makers[init](distance)


class MixingMatrix(nn.Module):
    """One mixing matrix a layer, shared by heads and batch unless ``heads`` is given.

    Args:
        grid_or_count: a BlockGrid, blocks per axis, or a number of blocks on one axis.
        init: see :func:`initial_mixing`.
        learnable: False keeps the initial values (the paper's ablation).
        causal: the upper triangle is zero.
        clamp: range that :meth:`project_` restores after every optimizer step; None leaves the values free.
        heads: one matrix a head.
        exp_sigma, local_thres, value: options of the initialisations.

    Attributes:
        weight: (blocks, blocks) or (heads, blocks, blocks); row = query block.
    """

    def __init__(
        self,
        grid_or_count: BlockGrid | Sequence[int] | int,
        init: str = "local_row",
        learnable: bool = True,
        causal: bool = False,
        clamp: Sequence[float] | None = (0.0, 1.0),
        heads: int | None = None,
        *,
        exp_sigma: float = 3.0,
        local_thres: float = 1.5,
        value: float = 1e-6,
    ) -> None:
        super().__init__()
        if isinstance(grid_or_count, BlockGrid):
            grid = grid_or_count
        else:
            counts = [grid_or_count] if isinstance(grid_or_count, int) else grid_or_count
            grid = BlockGrid(counts, block_size=1)
        if clamp is not None and not (len(clamp) == 2 and clamp[0] < clamp[1]):
            raise UserError(f"mix_clamp takes [low, high] with low < high, or null, got {clamp}")
        weight = initial_mixing(grid.distances(), init, exp_sigma=exp_sigma, local_thres=local_thres, value=value).float()
        if causal:
            weight = weight.tril()
        if heads is not None:
            weight = weight.expand(heads, -1, -1).clone()
        self.causal = causal
        self.clamp = None if clamp is None else (float(clamp[0]), float(clamp[1]))
        self.weight = nn.Parameter(weight, requires_grad=learnable)

    @property
    def blocks(self) -> int:
        return self.weight.shape[-1]

    def matrix(self, blocks: int | None = None) -> Tensor:
        """(blocks, blocks) or (heads, blocks, blocks). A causal matrix serves fewer blocks than it has; every other needs its own number.

        Raises:
            UserError: a number of blocks that this matrix cannot serve.
        """
        blocks = self.blocks if blocks is None else blocks
        if blocks > self.blocks or (blocks < self.blocks and not self.causal):
            raise UserError(
                f"the mixing matrix serves {self.blocks} blocks, the tokens make {blocks}; keep their number (blocks: ...) on another grid"
            )
        weight = self.weight[..., :blocks, :blocks]
        return weight.tril() if self.causal else weight

    @torch.no_grad()
    def project_(self) -> None:
        """Restores the constraint after an optimizer step: values inside ``clamp``, upper triangle zero when causal (SPEC 1.3)."""
        if self.clamp is not None:
            self.weight.clamp_(*self.clamp)
        if self.causal:
            self.weight.tril_()
