"""The learned matrix that mixes block summaries (paper Eq. 4 and Sec. 4.2; SPEC 1.2 to 1.4)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

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


def _causal_local(distance: Tensor) -> Tensor:
    """The paper's locality rule among the blocks that row i may see: the farthest is i blocks away."""
    farthest = torch.arange(len(distance), dtype=distance.dtype, device=distance.device).clamp_min(1)[:, None]
    return _rows(_linear(distance, farthest).clamp_min(_LEAST_LOCAL).tril())


def _decay(distance: Tensor, sigma: float | None) -> Tensor:
    return torch.exp(-distance / (_CAUSAL_SIGMA if sigma is None else sigma))


_LEAST_LOCAL = 1e-3  # of causal_local: a weight of 0 would never get a gradient through a clamp at 0
_SIGMA, _CAUSAL_SIGMA = 3.0, 1.0


def initial_mixing(
    distance: Tensor,
    init: str,
    *,
    exp_sigma: float | None = None,
    local_thres: float = 1.5,
    value: float = 1e-6,
) -> Tensor:
    """The initial mixing matrix, (blocks, blocks): row = query block, column = key block.

    Args:
        distance: (blocks, blocks), ``BlockGrid.distances()``.
        init: `local_row` is the paper's (Sec. 4.2); the release has `linear`, `cos`, `exp`, `gaussian`,
            `local`, `const`, and `causal_uniform` for language; `causal_local` is the paper's rule among
            earlier blocks, `causal_exp` exp(-distance / exp_sigma) of them, not normalised.
        exp_sigma: decay length of `exp` (default 3) and `causal_exp` (default 1), in blocks.
        local_thres: radius of `local`, in blocks.
        value: the entry of `const`.

    Raises:
        UserError: unknown name.
    """
    makers: dict[str, Callable[[Tensor], Tensor]] = {
        "local_row": lambda d: _rows(_linear(d, d.amax(1, keepdim=True))),
        "linear": lambda d: _columns(_linear(d, d.max())),
        "cos": lambda d: _columns(torch.cos(d / d.max() * math.pi / 4)),
        "exp": lambda d: _columns(_decay(d, _SIGMA if exp_sigma is None else exp_sigma)),
        "gaussian": lambda d: torch.exp(-d.square() / (2 * (d.max() / 3).square())),
        "local": lambda d: _columns((d <= local_thres).to(d.dtype)),
        "uniform": lambda d: _rows(torch.ones_like(d)),
        "causal_uniform": _causal_uniform,
        "causal_local": _causal_local,
        "causal_exp": lambda d: _decay(d, exp_sigma).tril(),
        "const": lambda d: torch.full_like(d, value),
    }
    if init not in makers:
        raise UserError(unknown_name("mix_init", init, makers))
    if len(distance) == 1 and init != "const":  # every rule divides by the largest distance, 0 here (SPEC P8)
        return torch.ones_like(distance)
    return makers[init](distance)


def initial_relative(
    distances: int, init: str, *, exp_sigma: float | None = None, value: float = 1e-6
) -> Tensor:
    """Initial weights by distance in blocks, (distances,): the causal initialisations without the
    normalisation of rows, which they cannot have.

    Raises:
        UserError: a name that is none of these.
    """
    distance = torch.arange(distances, dtype=torch.float64)
    makers: dict[str, Callable[[Tensor], Tensor]] = {
        "causal_uniform": torch.ones_like,
        "causal_local": lambda d: _linear(d, d.max().clamp_min(1)).clamp_min(_LEAST_LOCAL),
        "causal_exp": lambda d: _decay(d, exp_sigma),
        "const": lambda d: torch.full_like(d, value),
    }
    if init not in makers:
        raise UserError(unknown_name("mix_init", init, makers, of="the relative form"))
    return makers[init](distance)


FORMS = ("absolute", "relative")
CLAMP_AT = ("step", "forward")
_OPTIONS = ("exp_sigma", "local_thres", "value")


def mix_options(given: Mapping[str, float] | None) -> dict[str, float]:
    """`mix_init_options` of an attention entry, checked. Raises UserError for an unknown key."""
    for key in given or {}:
        if key not in _OPTIONS:
            raise UserError(unknown_name("mix_init_options key", key, _OPTIONS))
    return dict(given or {})


class MixingMatrix(nn.Module):
    """One mixing matrix a layer, shared by heads and batch unless ``heads`` is given.

    Args:
        grid_or_count: a BlockGrid, blocks per axis, or a number of blocks on one axis.
        init: see :func:`initial_mixing`.
        learnable: False keeps the initial values (the paper's ablation).
        causal: the upper triangle is zero.
        form: `absolute` is the paper's matrix. `relative` (causal, beyond the paper) has one weight a head
            and distance in blocks; beyond the distances it has, the last weight holds, so it serves any
            number of blocks.
        clamp: range that :meth:`project_` restores after every optimizer step; None leaves the values free.
        heads: one matrix a head.
        clamp_at: `step`, or `forward` as in the release's language model: every forward also sees clamped
            values, whatever was loaded.
        exp_sigma, local_thres, value: options of the initialisations.

    Attributes:
        weight: (blocks, blocks) or (heads, blocks, blocks), row = query block; relative: (heads or 1,
            distances).
    """

    def __init__(
        self,
        grid_or_count: BlockGrid | Sequence[int] | int,
        init: str = "local_row",
        learnable: bool = True,
        causal: bool = False,
        clamp: Sequence[float] | None = (0.0, 1.0),
        heads: int | None = None,
        form: str = "absolute",
        clamp_at: str = "step",
        *,
        exp_sigma: float | None = None,
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
        if form not in FORMS:
            raise UserError(unknown_name("mix_form", form, FORMS))
        if form == "relative":
            if not causal:
                raise UserError(
                    "mix_form 'relative' counts the blocks back to an earlier one: it needs a causal model"
                )
            weight = (
                initial_relative(grid.num_blocks, init, exp_sigma=exp_sigma, value=value)
                .float()
                .expand(heads or 1, -1)
                .clone()
            )
        else:
            weight = initial_mixing(
                grid.distances(), init, exp_sigma=exp_sigma, local_thres=local_thres, value=value
            ).float()
            weight = weight.tril() if causal else weight
            weight = weight if heads is None else weight.expand(heads, -1, -1).clone()
        if clamp_at not in CLAMP_AT:
            raise UserError(unknown_name("mix_clamp_at", clamp_at, CLAMP_AT))
        self.causal, self.form, self.clamp_at = causal, form, clamp_at
        self.clamp = None if clamp is None else (float(clamp[0]), float(clamp[1]))
        self.weight = nn.Parameter(weight, requires_grad=learnable)

    @property
    def blocks(self) -> int:
        return self.weight.shape[-1]

    def values(self) -> Tensor:
        """The weight as a forward uses it. A clamp there leaves the gradient alone, as the release's
        in-place one does.
        """
        if self.clamp is None or self.clamp_at == "step":
            return self.weight
        return self.weight + (self.weight.clamp(*self.clamp) - self.weight).detach()

    def matrix(self, blocks: int | None = None) -> Tensor:
        """(blocks, blocks) or (heads, blocks, blocks). A causal matrix serves fewer blocks than it has, a
        relative one any; every other its own.

        Raises:
            UserError: a number of blocks that this matrix cannot serve.
        """
        blocks = self.blocks if blocks is None else blocks
        if self.form == "relative":
            number = torch.arange(blocks, device=self.weight.device)
            return self.values()[:, (number[:, None] - number).clamp(0, self.blocks - 1)].tril()
        if blocks > self.blocks or (blocks < self.blocks and not self.causal):
            raise UserError(
                f"the mixing matrix serves {self.blocks} blocks, the tokens make {blocks}; keep "
                "their number (blocks: ...) on another grid"
            )
        weight = self.values()[..., :blocks, :blocks]
        return weight.tril() if self.causal else weight

    @torch.no_grad()
    def project_(self) -> None:
        """Restores the constraint after an optimizer step: values inside ``clamp``, upper triangle zero
        when causal (SPEC 1.3).
        """
        if self.clamp is not None:
            self.weight.clamp_(*self.clamp)
        if self.causal and self.form == "absolute":
            self.weight.tril_()
