"""Exact softmax over the own and the previous chunk, beside the mixed summaries (beyond the paper); its
cost stays linear.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from mhla_lightning.attention.chunks import split
from mhla_lightning.attention.packing import Packing


def window_attention(q: Tensor, k: Tensor, v: Tensor, chunk_size: int, packing: Packing | None) -> Tensor:
    """Softmax of every token over its own chunk, up to itself, and the chunk before it.

    Args:
        q, k: (batch, heads, tokens, dim_k), as softmax takes them: rotated, without feature map.
        v: (batch, heads, tokens, dim_v).
        chunk_size: tokens a chunk.
        packing: of padded or packed rows; no token sees another document.

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
    """(batch, heads, M, size, dim) with every chunk in the place of the next, zeros in the first."""
    return F.pad(x[:, :, :-1], (0, 0, 0, 0, 1, 0))


@dataclass
class Window:
    """Keys and values of the previous and the current chunk.

    keys: (batch, heads, 2 size, dim_k), values: (batch, heads, 2 size, dim_v); the first half is the previous
        chunk.
    seen: of every sequence, tokens so far.
    """

    keys: Tensor
    values: Tensor
    seen: list[int]

    @property
    def size(self) -> int:
        return self.keys.shape[2] // 2

    @property
    def bytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def reorder(self, indices: Tensor) -> Window:
        keys, values = (x.index_select(0, indices.to(x.device)) for x in (self.keys, self.values))
        return Window(keys, values, [self.seen[i] for i in indices.tolist()])

    def step(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Window]:
        """One more token of every sequence: (batch, heads, dim) each -> (batch, heads, dim_v), and the
        window with it.
        """
        size, device = self.size, k.device
        turning = torch.tensor([n > 0 and n % size == 0 for n in self.seen], device=device)[
            :, None, None, None
        ]
        keys, values = (torch.where(turning, x.roll(size, 2), x) for x in (self.keys, self.values))
        places = torch.tensor([size + n % size for n in self.seen], device=device)
        here = (torch.arange(2 * size, device=device) == places[:, None])[:, None, :, None]
        keys, values = torch.where(here, k.unsqueeze(2), keys), torch.where(here, v.unsqueeze(2), values)
        first = torch.tensor([size if n < size else 0 for n in self.seen], device=device)[:, None]
        place = torch.arange(2 * size, device=device)
        used = (place >= first) & (place <= places[:, None])
        scores = (q.unsqueeze(-2) @ keys.transpose(-2, -1)) * q.shape[-1] ** -0.5
        weights = scores.masked_fill(~used[:, None, None], -torch.inf).softmax(-1)
        return (weights @ values).squeeze(-2), replace(
            self, keys=keys, values=values, seen=[n + 1 for n in self.seen]
        )


def window_after(k: Tensor, v: Tensor, chunk_size: int, packing: Packing | None) -> Window:
    """The window behind (batch, heads, tokens, dim), rotated keys, of one document a row."""
    chunks = None if packing is None else packing.chunks(chunk_size)
    seen = [k.shape[2]] * k.shape[0] if packing is None else packing.real.sum(1).tolist()
    # A full chunk stays the current one until the next token comes.
    current = torch.tensor([max(0, n - 1) // chunk_size for n in seen], device=k.device)
    rows = torch.arange(len(seen), device=k.device)
    halves = []
    for x in (k, v):
        cut = F.pad(split(x, chunk_size, chunks), (0, 0, 0, 0, 1, 0))  # chunk b stands at b + 1
        halves.append(torch.cat([cut[rows, :, current], cut[rows, :, current + 1]], dim=2))
    return Window(halves[0], halves[1], seen)
