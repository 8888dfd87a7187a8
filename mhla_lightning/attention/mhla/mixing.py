"""The learned matrix that mixes block summaries (paper Eq. 4 and Sec. 4.2; SPEC 1.2 to 1.4)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from mhla_lightning.attention.base import known
from mhla_lightning.attention.mhla.grid import BlockGrid
from mhla_lightning.attention.mhla.relative import average_by_offset, expand_relative
from mhla_lightning.errors import UserError, unknown_name


def _linear(distance: Tensor, largest: Tensor) -> Tensor:
    return 1 - distance / largest


def _rows(weight: Tensor) -> Tensor:
    """Normalize every row to sum 1."""
    return weight / weight.sum(1, keepdim=True)


def _columns(weight: Tensor) -> Tensor:
    """Normalize every column to sum 1."""
    return weight / weight.sum(0, keepdim=True)


def _causal_uniform(distance: Tensor) -> Tensor:
    return _rows(torch.ones_like(distance).tril())


def _causal_local(distance: Tensor) -> Tensor:
    """Apply the paper's locality rule to the blocks that row i sees.

    The farthest is i blocks away.
    """
    farthest = torch.arange(len(distance), dtype=distance.dtype, device=distance.device).clamp_min(1)[:, None]
    return _rows(_linear(distance, farthest).clamp_min(_LEAST_LOCAL).tril())


def _decay(distance: Tensor, sigma: float | None) -> Tensor:
    return torch.exp(-distance / (_CAUSAL_SIGMA if sigma is None else sigma))


_LEAST_LOCAL = 1e-3  # of causal_local: a weight of 0 would never get a gradient through a clamp at 0
_SIGMA, _CAUSAL_SIGMA = 3.0, 1.0  # blocks


@dataclass(frozen=True)
class MixingInit:
    """Options of the initializations of a mixing matrix.

    Args:
        exp_sigma: decay length of `exp` and `causal_exp`, in blocks; None means 3 and 1.
        local_thres: radius of `local`, in blocks.
        value: the entry of `const`.

    Raises:
        UserError: a value outside its range.
    """

    exp_sigma: float | None = None
    local_thres: float = 1.5
    value: float = 1e-6

    def __post_init__(self) -> None:
        least = {"exp_sigma": math.ulp(0.0), "local_thres": 0.0, "value": -math.inf}
        for name, bound in least.items():
            given = getattr(self, name)
            if given is None and name == "exp_sigma":
                continue
            number = isinstance(given, int | float) and not isinstance(given, bool) and math.isfinite(given)
            if not number or given < bound:
                wanted = {"exp_sigma": "a number above 0", "local_thres": "a number of at least 0"}
                raise UserError(
                    f"mix_init_options.{name}", f"found {given!r}; give {wanted.get(name, 'a number')}"
                )

    @classmethod
    def of(cls, given: Mapping[str, float] | None) -> MixingInit:
        """Return the options of an attention entry's `mix_init_options`.

        Raises:
            UserError: no mapping, an unknown key, or a value outside its range.
        """
        if given is not None and not isinstance(given, Mapping):
            raise UserError("mix_init_options", f"found {given!r}; give a mapping such as {{exp_sigma: 2.0}}")
        keys = [field.name for field in fields(cls)]
        for key in given or {}:
            if key not in keys:
                raise UserError(f"mix_init_options.{key}", unknown_name("option", key, keys))
        return cls(**(given or {}))


def initial_mixing(
    distance: Tensor,
    init: str,
    *,
    exp_sigma: float | None = None,
    local_thres: float = 1.5,
    value: float = 1e-6,
) -> Tensor:
    """Return the initial mixing matrix, (blocks, blocks): row = query block, column = key block.

    Args:
        distance: (blocks, blocks), ``BlockGrid.distances()``.
        init: name of the rule. `local_row` is the paper's (Sec. 4.2). `linear`, `cos`, `exp`, `gaussian`,
            `local` and `const` are the release's, and `causal_uniform` for language. `causal_local` is the
            paper's rule among earlier blocks. `causal_exp` is exp(-distance / exp_sigma) of them, not
            normalized. `uniform` is 1 / blocks.
        exp_sigma, local_thres, value: see :class:`MixingInit`.

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
    known("init", init, tuple(makers))
    if len(distance) == 1 and init != "const":  # every rule divides by the largest distance, 0 here (SPEC P8)
        return torch.ones_like(distance)
    return makers[init](distance)


def initial_relative(
    distances: int, init: str, *, exp_sigma: float | None = None, value: float = 1e-6
) -> Tensor:
    """Return initial weights by distance in blocks, (distances,).

    These are the causal rules without the normalization of rows, which weights by distance cannot have.

    Args:
        distances: number of distances, from 0 on.
        init: `causal_uniform`, `causal_local`, `causal_exp` or `const`.
        exp_sigma, value: see :class:`MixingInit`.

    Raises:
        UserError: any other name.
    """
    distance = torch.arange(distances, dtype=torch.float64)
    makers: dict[str, Callable[[Tensor], Tensor]] = {
        "causal_uniform": torch.ones_like,
        "causal_local": lambda d: _linear(d, d.max().clamp_min(1)).clamp_min(_LEAST_LOCAL),
        "causal_exp": lambda d: _decay(d, exp_sigma),
        "const": lambda d: torch.full_like(d, value),
    }
    if init not in makers:
        raise UserError("init", unknown_name("name", init, makers, of="the relative form"))
    return makers[init](distance)


FORMS = ("absolute", "relative")
CLAMP_AT = ("step", "forward")


@contextmanager
def keys_of_an_entry() -> Iterator[None]:
    """Prefix the keys of a mixing matrix's errors with `mix_`, as in an attention entry."""
    try:
        yield
    except UserError as error:
        error.key = f"mix_{error.key}"
        raise


class MixingMatrix(nn.Module):
    """The mixing matrix of one layer, shared by heads and batch unless ``heads`` is given.

    Args:
        grid_or_count: a BlockGrid, blocks per axis, or a number of blocks on one axis.
        init: name of the initialization, see :func:`initial_mixing`.
        learnable: False keeps the initial values (the paper's ablation).
        causal: whether the upper triangle is zero.
        clamp: range [low, high] that :meth:`project_` restores after every optimizer step; None leaves the
            values free.
        heads: number of heads, for one matrix per head; None means one for all.
        form: `absolute` is the paper's matrix. `relative` (beyond the paper) has one weight per head and
            offset between blocks along each axis; when causal, one per distance to an earlier block. The
            outermost weights also serve all larger offsets, so the form serves any number of blocks. It
            starts as the average of the absolute matrix over each offset.
        clamp_at: `step`, or `forward` as in the release's language model, where every forward also clamps the
            values that it uses.
        init_options: options of the initialization.

    Attributes:
        blocks: rows of the matrix, or distances of the causal relative form.
        counts: blocks per axis.
        weight: (blocks, blocks) or (heads, blocks, blocks), row = query block; relative: (heads or 1,
            offsets), in the order of :mod:`mhla_lightning.attention.mhla.relative`, or (heads or 1,
            distances) when causal.

    Raises:
        UserError: unknown names, or an invalid range.
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
        init_options: MixingInit | None = None,
    ) -> None:
        super().__init__()
        if isinstance(grid_or_count, BlockGrid):
            grid = grid_or_count
        else:
            counts = [grid_or_count] if isinstance(grid_or_count, int) else grid_or_count
            grid = BlockGrid(counts, block_size=1)
        if clamp is not None and not (
            isinstance(clamp, Sequence) and len(clamp) == 2 and clamp[0] < clamp[1]
        ):
            raise UserError("clamp", f"found {clamp}; give [low, high] with low < high, or null")
        known("form", form, FORMS)
        known("clamp_at", clamp_at, CLAMP_AT)
        options = MixingInit() if init_options is None else init_options
        if form == "relative" and causal:
            by_distance = initial_relative(
                grid.num_blocks, init, exp_sigma=options.exp_sigma, value=options.value
            )
            weight = by_distance.float().expand(heads or 1, -1).clone()
        elif form == "relative":
            by_offset = average_by_offset(
                initial_mixing(grid.distances(), init, **asdict(options)), grid.blocks
            )
            weight = by_offset.float().expand(heads or 1, -1).clone()
        else:
            weight = initial_mixing(grid.distances(), init, **asdict(options)).float()
            weight = weight.tril() if causal else weight
            weight = weight if heads is None else weight.expand(heads, -1, -1).clone()
        self.causal, self.form, self.clamp_at = causal, form, clamp_at
        self.clamp = None if clamp is None else (float(clamp[0]), float(clamp[1]))
        self.blocks, self.counts = grid.num_blocks, grid.blocks
        self.weight = nn.Parameter(weight, requires_grad=learnable)
        self.register_load_state_dict_pre_hook(_refuse_other_form)

    def forward(self) -> Tensor:
        """Return the weight as an operator uses it.

        It is a call of the module, so that ZeRO-3 gathers the weight before and frees it after.
        A clamp here leaves the gradient unchanged, as the release's in-place clamp does.
        """
        if self.clamp is None or self.clamp_at == "step":
            return self.weight
        return self.weight + (self.weight.clamp(*self.clamp) - self.weight).detach()

    def matrix(self, blocks: int | Sequence[int] | None = None) -> Tensor:
        """Return the matrix for a number of blocks, (blocks, blocks) or (heads, blocks, blocks).

        A relative matrix serves any number of blocks, a causal one its own number or fewer, and every other
        exactly its own.

        Args:
            blocks: number of blocks, or blocks per axis, which a relative form on several axes needs; None
                means the matrix's own.

        Raises:
            UserError: a number of blocks that this matrix cannot serve.
        """
        counts = self.counts if blocks is None else (blocks,) if isinstance(blocks, int) else tuple(blocks)
        if self.form == "relative" and not self.causal:
            if len(counts) != len(self.counts):
                raise UserError("blocks", f"found {counts}; give one count for each axis of {self.counts}")
            return expand_relative(self(), self.counts, counts)
        blocks = math.prod(counts)
        if self.form == "relative":
            weight = self()
            number = torch.arange(blocks, device=weight.device)
            return weight[:, (number[:, None] - number).clamp(0, self.blocks - 1)].tril()
        if blocks > self.blocks or (blocks < self.blocks and not self.causal):
            raise UserError(
                "blocks",
                f"the tokens make {blocks} blocks, and the mixing matrix serves {self.blocks}; give `blocks` "
                "instead of `block_size`, so that every grid has as many, or `mix_form: relative`",
            )
        weight = self()[..., :blocks, :blocks]
        return weight.tril() if self.causal else weight

    def form_of(self, shape: Sequence[int]) -> str | None:
        """Return the form of weights of another shape.

        None for this matrix's own shape, and where nothing tells the form.
        """
        if tuple(shape) == tuple(self.weight.shape) or not self.weight.numel():  # ZeRO-3 holds it elsewhere
            return None
        square = len(shape) > 1 and shape[-1] == shape[-2]
        return "absolute" if len(shape) == 3 or square else "relative" if len(shape) == 2 else None

    @torch.no_grad()
    def project_(self) -> None:
        """Restore the constraints after an optimizer step (SPEC 1.3).

        Values are clamped to the range ``clamp``; the upper triangle is zero when causal.
        """
        if self.clamp is not None:
            self.weight.clamp_(*self.clamp)
        if self.causal and self.form == "absolute":
            self.weight.tril_()


def _refuse_other_form(module: MixingMatrix, state: Mapping[str, Tensor], prefix: str, *others: Any) -> None:
    """Refuse weights of the other form before torch compares shapes: a hook.

    Raises:
        UserError: with the name of the weight.
    """
    name = f"{prefix}weight"
    value = state.get(name)
    found = None if value is None else module.form_of(value.shape)
    if value is not None and found not in (None, module.form):
        way = "convert: `init_from`, or in Python model.load_state_dict(model.adapt_state_dict(state))"
        if found == "relative" and len(value) > 1 and module.weight.dim() == 2:
            way = f"with `mix_per_head` true and {way}"  # one matrix has no room for several heads
        if module.causal:
            way = "start this matrix anew with `init_from`, which takes all others"
        raise UserError(
            name,
            f"it has the {found} form of mixing, {tuple(value.shape)}, and this model the {module.form} one, "
            f"{tuple(module.weight.shape)}; build the model with `mix_form` {found}, or {way}",
        )
