"""Exact softmax over the own and the previous chunk, beside mixed summaries.

It goes beyond the paper, and its cost is linear in the tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from mhla_lightning.attention.base import sent
from mhla_lightning.attention.chunks import split
from mhla_lightning.attention.packing import Packing


def window_attention(q: Tensor, k: Tensor, v: Tensor, chunk_size: int, packing: Packing | None) -> Tensor:
    """Compute softmax of every token over its own chunk, up to itself, and the chunk before it.

    Args:
        q, k: (batch, heads, tokens, dim_k), rotated, without feature map.
        v: (batch, heads, tokens, dim_v).
        chunk_size: tokens per chunk.
        packing: of padded or packed rows, so that no token sees another document; None means one document per
            row.

    Returns:
        (batch, heads, tokens, dim_v)
    """
    chunks = None if packing is None else packing.chunks(chunk_size)
    tokens = q.shape[2]
    q, k, v = (split(x, chunk_size, chunks) for x in (q * q.shape[-1] ** -0.5, k, v))
    before, own = q @ _previous(k).transpose(-2, -1), q @ k.transpose(-2, -1)
    later = torch.ones(chunk_size, chunk_size, dtype=torch.bool, device=q.device).triu(1)
    number = torch.arange(q.shape[2], device=q.device)[None] if chunks is None else chunks.number
    first = (number == 0)[:, None, :, None, None]
    scores = torch.cat(
        [before.masked_fill(first, -torch.inf), own.masked_fill(later, -torch.inf)], dim=-1
    ).softmax(-1)
    out = scores[..., :chunk_size] @ _previous(v) + scores[..., chunk_size:] @ v
    if chunks is None:
        return out.flatten(2, 3)[:, :, :tokens]
    return chunks.join(out.permute(0, 2, 3, 1, 4)).transpose(1, 2)


def _previous(x: Tensor) -> Tensor:
    """Shift the chunks of (batch, heads, M, size, dim) by one, with zeros in the first."""
    return F.pad(x[:, :, :-1], (0, 0, 0, 0, 1, 0))


@dataclass
class Window:
    """Keys and values of the previous and the current chunk.

    Attributes:
        keys: (batch, heads, 2 size, dim_k); the first half is the previous chunk.
        values: (batch, heads, 2 size, dim_v), likewise.
        seen: tokens so far, of every sequence.
    """

    keys: Tensor
    values: Tensor
    seen: list[int]

    @property
    def size(self) -> int:
        """Tokens per chunk."""
        return self.keys.shape[2] // 2

    @property
    def bytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def reorder(self, indices: Tensor) -> Window:
        keys, values = (x.index_select(0, indices.to(x.device)) for x in (self.keys, self.values))
        return Window(keys, values, [self.seen[i] for i in indices.tolist()])

    def step(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Window]:
        """Process one more token of every sequence.

        Args:
            q, k: (batch, heads, dim_k).
            v: (batch, heads, dim_v).

        Returns:
            (batch, heads, dim_v), and the window with the token.
        """
        size, device = self.size, k.device
        begins = sent([n > 0 and n % size == 0 for n in self.seen], device)
        keys, values = (
            torch.where(begins[:, None, None, None], x.roll(size, 2), x) for x in (self.keys, self.values)
        )
        places = sent([size + n % size for n in self.seen], device)
        here = (torch.arange(2 * size, device=device) == places[:, None])[:, None, :, None]
        keys, values = torch.where(here, k.unsqueeze(2), keys), torch.where(here, v.unsqueeze(2), values)
        first = sent([size if n < size else 0 for n in self.seen], device)[:, None]
        place = torch.arange(2 * size, device=device)
        used = (place >= first) & (place <= places[:, None])
        scores = (q.unsqueeze(-2) @ keys.transpose(-2, -1)) * q.shape[-1] ** -0.5
        weights = scores.masked_fill(~used[:, None, None], -torch.inf).softmax(-1)
        window = replace(self, keys=keys, values=values, seen=[n + 1 for n in self.seen])
        return (weights @ values).squeeze(-2), window


def window_after(k: Tensor, v: Tensor, chunk_size: int, packing: Packing | None) -> Window:
    """Return the window after a call with one document per row.

    Args:
        k: (batch, heads, tokens, dim_k), rotated.
        v: (batch, heads, tokens, dim_v).
        chunk_size: tokens per chunk.
        packing: of padded rows; None means all tokens are real.
    """
    chunks = None if packing is None else packing.chunks(chunk_size)
    seen = [k.shape[2]] * k.shape[0] if packing is None else packing.real.sum(1).tolist()
    # A full chunk stays the current one until the next token comes.
    current = torch.tensor([max(0, n - 1) // chunk_size for n in seen], device=k.device)
    rows = torch.arange(len(seen), device=k.device)
    halves = []
    for x in (k, v):
        cut = F.pad(split(x, chunk_size, chunks), (0, 0, 0, 0, 1, 0))  # chunk b is at b + 1
        halves.append(torch.cat([cut[rows, :, current], cut[rows, :, current + 1]], dim=2))
    return Window(halves[0], halves[1], seen)
