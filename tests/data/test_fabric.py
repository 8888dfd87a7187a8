"""Our loaders in Lightning's Fabric: the same order, and a position that its state keeps."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import pytest

from mhla_lightning.data import ImageDataModule, ReadingConfig

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers.*")


def make(shards: Path, **options: Any) -> ImageDataModule:
    return ImageDataModule(str(shards), 16, image_size=8, reading=ReadingConfig(num_workers=0), **options)


def keys(batches: Any, count: int) -> list[list[str]]:
    return [batch["key"] for batch in islice(batches, count)]


def test_fabric_takes_the_loaders_and_resumes_in_the_middle(shards: Path) -> None:
    """Fabric refused them: it takes torch's class alone."""
    fabric: Any = L.Fabric(accelerator="cpu", devices=1)  # typed for torch's class alone
    data = make(shards, micro_batch_size=8)
    train, val = fabric.setup_dataloaders(data.train_dataloader(), data.val_dataloader())
    whole = keys(make(shards, micro_batch_size=8).train_dataloader(), 10)
    assert keys(train, 5) == whole[:5]
    assert len(val) == len(list(val)) == len(list(val)) == 3, "a pass over val begins anew"
    state = data.state_dict()
    assert state["consumed"] == 32, "half a step is taken again"
    assert keys(train, 4) == whole[4:8], "another iteration goes on"
    again = make(shards, micro_batch_size=8)
    again.load_state_dict(state)
    assert keys(fabric.setup_dataloaders(again.train_dataloader()), 6) == whole[4:10]
    assert keys(data.train_dataloader(), 1) == whole[:1], "a new loader begins where the data module does"
    with pytest.raises(TypeError):
        len(train)
