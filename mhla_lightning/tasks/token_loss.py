"""Next-token loss that never holds the logits of a whole batch.

They would have batch x tokens x vocabulary elements.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mhla_lightning.attention.base import accumulation_dtype

IGNORE = -100  # a target that does not count
_LOGITS = 2**25  # logits held at once: 128 MiB in float32
# On a GPU, 512 MiB: under autocast every chunk casts the output's weights, and adds to their gradient, anew.
_LOGITS_ON_GPU = 2**27
_as_on_gpu: ContextVar[bool] = ContextVar("as_on_gpu", default=False)


@contextmanager
def chunks_as_on_gpu() -> Iterator[None]:
    """Hold as many logits at once in the block as on a GPU, to count its memory on a CPU."""
    token = _as_on_gpu.set(True)
    try:
        yield
    finally:
        _as_on_gpu.reset(token)


def _held(device: torch.device) -> int:
    return _LOGITS_ON_GPU if device.type == "cuda" or _as_on_gpu.get() else _LOGITS


def token_loss(
    features: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    z_loss: float = 0.0,
    total: bool = False,
    chunk: int | None = None,
) -> Tensor:
    """Return the cross entropy of softmax(features weight^T) in nats, a scalar.

    It is 0 where no target counts.

    Args:
        features: (..., C).
        weight: (V, C).
        targets: (...) int64; IGNORE does not count.
        z_loss: coefficient of logsumexp^2, which keeps logits near 0 (PaLM, arXiv 2204.02311, section 5:
            1e-4).
        total: return the sum over counted targets instead of their mean.
        chunk: targets whose logits are held at once; None holds 2^25 logits, and 2^27 on a GPU.
    """
    features, targets = features.flatten(0, -2), targets.flatten()
    chunk = max(1, _held(features.device) // len(weight)) if chunk is None else chunk
    if z_loss == 0 and _torch_has_it(features):
        options = torch.nn.LinearCrossEntropyOptions(
            chunking_method=None, batch_chunk_size=min(chunk, len(targets))
        )
        loss = F.linear_cross_entropy(
            features, weight, targets, reduction="sum", ignore_index=IGNORE, options=options
        )
    else:
        loss = chunked_loss(features, weight, targets, z_loss, chunk)
    return loss if total else loss / (targets != IGNORE).sum().clamp_min(1)


def _torch_has_it(features: Tensor) -> bool:
    """Return whether torch's own chunked loss serves these features.

    torch >= 2.14 computes a chunk's gradients with its loss. But for bf16 it returns a bf16 sum (10.5 for
    10.47), and it ignores autocast.
    """
    exact = features.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(
        features.device.type
    )
    return exact and hasattr(torch.nn, "LinearCrossEntropyOptions")


def chunked_loss(features: Tensor, weight: Tensor, targets: Tensor, z_loss: float, chunk: int) -> Tensor:
    """Return the sum over counted targets of cross entropy + z_loss x logsumexp^2.

    The backward computes a chunk's logits again.

    Args:
        features: (N, C).
        weight: (V, C).
        targets: (N,).
        z_loss: coefficient.
        chunk: targets whose logits are held at once.
    """
    parts = [
        checkpoint(_part, rows, weight, goals, z_loss, use_reentrant=False, preserve_rng_state=False)
        for rows, goals in zip(features.split(chunk), targets.split(chunk), strict=True)
    ]
    return torch.stack(parts).sum()


def _part(features: Tensor, weight: Tensor, targets: Tensor, z_loss: float) -> Tensor:
    logits = F.linear(features, weight)
    logits = logits.to(accumulation_dtype(logits))
    loss = F.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORE)
    if z_loss:
        loss = loss + z_loss * (logits.logsumexp(-1).square() * (targets != IGNORE)).sum()
    return loss
