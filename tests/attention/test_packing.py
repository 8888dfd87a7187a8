"""Chunks of packed documents, cut from lengths on the host and from the device alike."""

from __future__ import annotations

import pytest
import torch

from mhla_lightning.attention.packing import Packing, document_lengths

DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2, 2], [3, 3, 3, 3, 3, 3, 4, -1, -1, -1], [-1] * 10])


def test_lengths_of_documents() -> None:
    assert document_lengths(DOCUMENTS >= 0, DOCUMENTS).tolist() == [[3, 2, 5], [6, 1, 0], [0, 0, 0]]
    left = torch.tensor([[False, False, True, True, True], [True] * 5])
    assert document_lengths(left, None).tolist() == [[3], [5]]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 16])
@pytest.mark.parametrize("rows", [[0, 1, 2], [2], [0], [1, 2]])
def test_lengths_on_the_host_change_no_chunk(size: int, rows: list[int]) -> None:
    documents = DOCUMENTS[rows]
    lengths = document_lengths(documents >= 0, documents)
    asked, told = (Packing(documents >= 0, documents, given).chunks(size) for given in (None, lengths))
    assert (asked.count, asked.longest) == (told.count, told.longest)
    for name in ("slot", "number", "document", "real"):
        assert torch.equal(getattr(asked, name), getattr(told, name))
