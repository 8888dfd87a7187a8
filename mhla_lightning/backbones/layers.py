"""Layers that the backbones put around self-attention."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mhla_lightning.attention import BlockGrid, DepthwiseConv, MixingMatrix, SelfAttention
from mhla_lightning.attention.context import PairRotary
from mhla_lightning.errors import UserError


class ConditionalPosition(nn.Module):
    """Conditional position encoding: x + depthwise 3x3(x) on raster tokens (SPEC D6).

    The convolution starts at zero, so a fresh one changes nothing.

    Args:
        dim: channels.
        axes: grid axes, 1 to 3.
    """

    def __init__(self, dim: int, axes: int) -> None:
        super().__init__()
        self.depthwise = DepthwiseConv(dim, axes, kernel_size=3)
        nn.init.zeros_(self.depthwise.conv.weight)
        if self.depthwise.conv.bias is not None:
            nn.init.zeros_(self.depthwise.conv.bias)

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """Return tokens of the shape of x, (batch, tokens, dim)."""
        return x + self.depthwise(x, grid)

    def flops(self, tokens: int) -> int:
        return self.depthwise.flops(tokens)


class BlockOrderConv(DepthwiseConv):
    """The release's `dwconv`: a depthwise 3x3 on tokens in block order (SPEC D6).

    The tokens are laid out as a square, and there is no residual. Neighbours in that square are not
    neighbours in the image; :class:`ConditionalPosition` is the paper's version.

    Args:
        dim: channels.
        blocks: the operator's partition; None for an operator without blocks, whose tokens stay in raster
            order.
        tokens: token count, a square number.

    Raises:
        UserError: a token count that is no square, or short blocks.
    """

    def __init__(self, dim: int, blocks: BlockGrid | None, tokens: int) -> None:
        super().__init__(dim, axes=2, kernel_size=3)
        if math.isqrt(tokens) ** 2 != tokens:
            raise UserError(
                "dwconv",
                f"it lays the tokens out as a square, and {tokens} is no square number; use the attention "
                "option `pos_conv` cpe3 instead",
            )
        if blocks is not None and not blocks.even:
            raise UserError(
                "dwconv",
                f"it needs full blocks, and {blocks} has short ones; use the attention option `pos_conv` "
                "cpe3 instead",
            )
        self.blocks, self.side = blocks, math.isqrt(tokens)

    def forward(self, x: Tensor, grid: Sequence[int] | None = None) -> Tensor:
        """Return tokens of the shape of x.

        Args:
            x: (batch, tokens, dim) in raster order.
            grid: ignored; the square replaces any grid.
        """
        square = (self.side, self.side)
        if self.blocks is None:
            return super().forward(x, square)
        out = super().forward(self.blocks.to_blocks(x).flatten(1, 2), square)
        return self.blocks.from_blocks(
            out.unflatten(1, (self.blocks.num_blocks, self.blocks.tokens_per_block))
        )


class TimestepEmbedder(nn.Module):
    """Embedding of the model time: a sinusoid, then Linear, SiLU, Linear (SPEC 4.2).

    Args:
        dim: channels of the embedding.
    """

    channels = 256  # of the sinusoid

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(self.channels, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        """Return (batch, dim) in the parameters' dtype; the sinusoid is float32.

        Args:
            t: (batch,) of any number type.
        """
        first = self.mlp[0]
        assert isinstance(first, nn.Linear)
        return self.mlp(time_sinusoid(t, self.channels).to(first.weight.dtype))

    def flops(self) -> int:
        return 2 * sum(layer.weight.numel() for layer in self.mlp if isinstance(layer, nn.Linear))


class LabelEmbedder(nn.Module):
    """One vector for each class, and a last one for the null label of classifier-free guidance.

    Args:
        num_classes: classes without the null label.
        dim: channels of the embedding.
    """

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def forward(self, y: Tensor) -> Tensor:
        """(batch,) int64 -> (batch, dim)"""
        return self.embedding_table(y)


class AngleRotation(PairRotary):
    """Rotary positions of given angles; neighbouring channels form a pair.

    Angles, sines and cosines are float64. They are rounded once, to the precision in which x is turned,
    which is float32 at least, as in diffusers. Turning in float64 changes the last bit only and takes seven
    times as long on a CPU.

    A pair is turned by one complex product. Under torch.compile it is turned by real products of the same
    bits, because Inductor generates no code for complex numbers.

    Args:
        angles: (tokens, 1, dim / 2) float64, for the pairs of every token.
    """

    def __init__(self, angles: Tensor) -> None:
        self.angles = angles
        self.turns: dict[torch.dtype, Tensor] = {}
        self.table: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """(batch, tokens, heads, dim) in raster order -> same shape and dtype"""
        wide = torch.promote_types(x.dtype, torch.float32)
        if torch.compiler.is_compiling():
            return self._real(x.to(wide)).to(x.dtype)
        pairs = torch.view_as_complex(x.to(wide).unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * self._rounded(wide)).flatten(-2).to(x.dtype)

    def turn_table(self) -> Tensor:
        """Return cosines and sines by token and pair, (tokens, dim / 2, 2) float32."""
        if self.table is None:
            self.table = torch.stack((self.angles.cos(), self.angles.sin()), -1).float().squeeze(1)
        return self.table

    def _rounded(self, wide: torch.dtype) -> Tensor:
        """Return the factors in the precision of float32 or float64."""
        if wide not in self.turns:
            turns = torch.polar(torch.ones_like(self.angles), self.angles)
            self.turns[wide] = turns if wide == torch.float64 else turns.to(torch.complex64)
        return self.turns[wide]

    def _real(self, x: Tensor) -> Tensor:
        cos, sin = self.angles.cos().to(x.dtype), self.angles.sin().to(x.dtype)
        first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1).flatten(-2)


class GridRotation(AngleRotation):
    """Rotary positions on a grid of three axes (SPEC 6.3).

    Each axis turns some of the pairs. Of c pairs a head, c - 2 (c // 3) belong to time, c // 3 to height and
    c // 3 to width. Pair j of the D channels of its axis turns by position / 10000^(2 j / D).

    Args:
        grid: (frames, rows, columns) of tokens.
        dim: channels of a head, even.
        device: device of the tokens.
    """

    def __init__(self, grid: Sequence[int], dim: int, device: torch.device) -> None:
        super().__init__(grid_angles(grid, dim, device))


class ImageRotation(AngleRotation):
    """Rotary positions on a grid of two axes, as in RAVLT (arXiv 2411.07635; SPEC 3.2).

    The first half of the pairs of a head turns by the row, the second by the column. Pair j of the c pairs
    of an axis turns by position / 10000^(j / (c - 1)).

    Args:
        grid: (rows, columns) of tokens.
        dim: channels of a head, a multiple of 4.
        device: device of the tokens.
    """

    def __init__(self, grid: Sequence[int], dim: int, device: torch.device) -> None:
        rows, columns = grid
        frequency = 10000.0 ** -torch.linspace(0, 1, dim // 4, dtype=torch.float64, device=device)
        row, column = (
            torch.arange(count, dtype=torch.float64, device=device)[:, None] * frequency for count in grid
        )
        angles = [row[:, None].expand(-1, columns, -1), column[None].expand(rows, -1, -1)]
        super().__init__(torch.cat(angles, dim=-1).reshape(-1, 1, dim // 2))


def grid_turns(grid: Sequence[int], dim: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the factors e^(i angle) of :class:`GridRotation`, (tokens, 1, dim / 2) complex128."""
    angles = grid_angles(grid, dim, device)
    return torch.polar(torch.ones_like(angles), angles)


def grid_angles(grid: Sequence[int], dim: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the angles of :class:`GridRotation`, (tokens, 1, dim / 2) float64 in raster order."""
    pairs = dim // 2
    by_axis = []
    for axis, (count, own) in enumerate(
        zip(grid, (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3), strict=True)
    ):
        frequency = 10000.0 ** (-torch.arange(own, dtype=torch.float64, device=device) / max(own, 1))
        angle = torch.arange(count, dtype=torch.float64, device=device)[:, None] * frequency
        shape = [1, 1, 1, own]
        shape[axis] = count
        by_axis.append(angle.view(shape).expand(*grid, own))
    return torch.cat(by_axis, dim=-1).reshape(-1, 1, pairs)


def take_grid(mine: SelfAttention, new: SelfAttention) -> None:
    """Give a layer the grid and the operator of another one, in its own device, dtype and mode.

    Args:
        mine: the layer that changes.
        new: of the other grid; it is used up.
    """
    for name, old in mine.attention.named_parameters():
        owner = new.attention.get_submodule(name.rpartition(".")[0])
        setattr(owner, name.rpartition(".")[2], placed_as(new.attention.get_parameter(name), old))
    mine.grid, mine.attention = new.grid, new.attention.train(mine.training)


def placed_as(new: nn.Parameter, old: nn.Parameter) -> nn.Parameter:
    """Return a parameter with the device, the dtype and the `requires_grad` of another."""
    return nn.Parameter(new.detach().to(old), requires_grad=old.requires_grad)


def check_heads(embed_dim: int, num_heads: int, key: str = "embed_dim") -> None:
    """Refuse a number of heads that does not divide the channels. Raises UserError.

    Args:
        embed_dim: channels.
        num_heads: heads.
        key: the option that holds the channels.
    """
    if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads:
        raise UserError("num_heads", f"{num_heads} heads do not divide the {embed_dim} channels of `{key}`")


def check_ratio(embed_dim: int, mlp_ratio: float) -> None:
    """Refuse a feed-forward network without a hidden channel. Raises UserError."""
    if int(mlp_ratio * embed_dim) < 1:
        raise UserError("mlp_ratio", f"{mlp_ratio} is too small; the network needs one channel")


def mixing_weights(model: nn.Module) -> set[str]:
    """Return the parameter names of a model's mixing matrices."""
    return {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, MixingMatrix)}


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Scale and shift, x (1 + scale) + shift: x (batch, tokens, dim), the others (batch, dim)."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def time_sinusoid(t: Tensor, channels: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the sinusoid of model times.

    It is [cos | sin] of t / 10000^(j / half), j = 0 ... half - 1.

    Args:
        t: (batch,).
        channels: even; half of them are cosines.
        dtype: of the result, (batch, channels).
    """
    half = channels // 2
    frequency = torch.exp(-math.log(10000) * torch.arange(half, dtype=dtype, device=t.device) / half)
    angle = t.to(dtype)[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def grid_sinusoid(grid: Sequence[int], dim: int) -> Tensor:
    """Return fixed positions of a grid of two axes (SPEC 4.2).

    The first half of the channels comes from the column and the second from the row. Each half is
    [sin(p w_0), ..., cos(p w_0), ...] with w_j = 10000^(-j / (dim / 4)).

    Args:
        grid: (rows, columns) of tokens.
        dim: channels, a multiple of 4.

    Returns:
        (rows * columns, dim) float32 in raster order.
    """
    rows, columns = grid
    frequency = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    by_axis = []
    for count in (columns, rows):
        angle = torch.arange(count, dtype=torch.float64)[:, None] * frequency
        by_axis.append(torch.cat([angle.sin(), angle.cos()], dim=-1))
    column, row = by_axis
    table = torch.cat([column[None].expand(rows, -1, -1), row[:, None].expand(-1, columns, -1)], dim=-1)
    return table.flatten(0, 1).float()
