"""One block of a VLT, written down anew: dense matrices, float64, nothing of the package but its weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def dense_block(
    x: Tensor,
    weights: Mapping[str, Tensor],
    grid: Sequence[int],
    heads: int,
    *,
    features: str,
    reweighted: bool = False,
    blocks: Sequence[int] | None = None,
) -> Tensor:
    """SPEC 3.2: convolution, gated attention with LePE and rotary positions, feed-forward with convolution.

    Args:
        x: (batch, tokens, dim) in raster order.
        weights: of the block, by name.
        grid: (rows, columns).
        heads: number of heads.
        features: `softmax`, `relu_eps` or `elu`.
        reweighted: RALA's weights of keys.
        blocks: of MHLA, per axis; None for one summary.
    """
    x = x + conv(x, grid, weights, "cpe.depthwise.conv")
    y = norm(x, weights, "norm1")
    q, k, v = linear(y, weights, "attn.qkv").chunk(3, dim=-1)
    matrix = attention_matrix(q, k, weights, grid, heads, features, reweighted, blocks)
    mixed = torch.einsum("bhts,bshd->bthd", matrix, v.unflatten(-1, (heads, -1))).flatten(2)
    gated = (mixed + conv(v, grid, weights, "attn.lepe.conv")) * linear(y, weights, "attn.gate")
    x = x + weights["ls1.gamma"] * linear(gated, weights, "attn.proj")
    y = linear(norm(x, weights, "norm2"), weights, "mlp.fc1")
    y = y * 0.5 * (1 + torch.erf(y / math.sqrt(2)))
    y = y + conv(y, grid, weights, "mlp.dwconv.conv")
    return x + weights["ls2.gamma"] * linear(y, weights, "mlp.fc2")


def attention_matrix(
    q: Tensor,
    k: Tensor,
    weights: Mapping[str, Tensor],
    grid: Sequence[int],
    heads: int,
    features: str,
    reweighted: bool,
    blocks: Sequence[int] | None,
) -> Tensor:
    """(batch, heads, tokens, tokens)"""
    q, k = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k))
    turns = rotation_matrices(grid, q.shape[-1])  # (tokens, dim, dim)
    if features == "softmax":
        scores = torch.einsum("tij,bhtj,sik,bhsk->bhts", turns, q, turns, k) / math.sqrt(q.shape[-1])
        return scores.softmax(-1)
    q, k = (F.elu(t) + 1 if features == "elu" else t.clamp_min(0) + 1e-6 for t in (q, k))
    if reweighted:
        mean = q.mean(2, keepdim=True)
        scores = (mean * k).sum(-1) / math.sqrt(q.shape[-1])
        k = k * (scores.softmax(-1) * k.shape[2]).unsqueeze(-1)
    turned = torch.einsum("tij,bhtj,sik,bhsk->bhts", turns, q, turns, k)
    plain = q @ k.mT
    if blocks is not None:
        block = block_of(grid, blocks)
        mixing = weights["attn.attention.mixing.weight"][block][:, block]
        turned, plain = mixing * turned, mixing * plain
    return turned / (plain.sum(-1, keepdim=True) + 1e-6)


def rotation_matrices(grid: Sequence[int], dim: int) -> Tensor:
    """A block-diagonal matrix of 2 x 2 rotations for each token, (tokens, dim, dim)."""
    found = torch.zeros(grid[0] * grid[1], dim, dim, dtype=torch.float64)
    quarter = dim // 4
    for token in range(len(found)):
        for pair in range(dim // 2):
            place = token // grid[1] if pair < quarter else token % grid[1]
            share = (pair % quarter) / (quarter - 1) if quarter > 1 else 0.0
            angle = place * 10000.0**-share
            cos, sin = math.cos(angle), math.sin(angle)
            at = slice(2 * pair, 2 * pair + 2)
            found[token, at, at] = torch.tensor([[cos, -sin], [sin, cos]], dtype=torch.float64)
    return found


def block_of(grid: Sequence[int], blocks: Sequence[int]) -> Tensor:
    """(tokens,) the block of every token."""
    rows, columns = (math.ceil(n / count) for n, count in zip(grid, blocks, strict=True))
    return torch.tensor(
        [r // rows * blocks[1] + c // columns for r in range(grid[0]) for c in range(grid[1])]
    )


def linear(x: Tensor, weights: Mapping[str, Tensor], name: str) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def norm(x: Tensor, weights: Mapping[str, Tensor], name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    return centred * scale * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def conv(x: Tensor, grid: Sequence[int], weights: Mapping[str, Tensor], name: str) -> Tensor:
    """A depthwise convolution as a sum over shifted images."""
    kernel, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
    size = kernel.shape[-1]
    image = F.pad(x.unflatten(1, tuple(grid)), (0, 0, *[size // 2] * 4))
    out = bias.expand(x.shape[0], *grid, -1)
    for row in range(size):
        for column in range(size):
            shifted = image[:, row : row + grid[0], column : column + grid[1]]
            out = out + shifted * kernel[:, 0, row, column]
    return out.flatten(1, 2)
