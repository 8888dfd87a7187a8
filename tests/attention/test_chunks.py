"""Chunks of rows under torch.compile, at lengths that fill their last chunk and lengths that do not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mhla_lightning.attention.chunks import split


@pytest.mark.parametrize("lengths", [(64, 48, 33), (40, 48, 64)])
def test_chunks_of_several_lengths_are_compiled(lengths: tuple[int, ...]) -> None:
    """The second length makes sizes symbolic; a length that needs no padding then kept other strides."""
    torch._dynamo.reset()

    def scores(x: Tensor) -> Tensor:
        chunks = split(x, 16, None)
        return chunks @ chunks.transpose(-2, -1)

    compiled = torch.compile(scores, backend="aot_eager", fullgraph=True)
    for length in lengths:
        x = torch.randn(2, length, 2, 4).transpose(1, 2)
        assert torch.equal(compiled(x), scores(x))
