"""DDP with gradients as views of its buckets, for a Trainer that is built in a block."""

from __future__ import annotations

import pytest
from lightning.pytorch.strategies import StrategyRegistry

from mhla_lightning.strategies.ddp import bucket_views


@pytest.mark.parametrize("name", ["ddp", "ddp_find_unused_parameters_true"])
def test_views_are_asked_for_in_the_block_only(name: str) -> None:
    before = dict(StrategyRegistry[name]["init_params"])
    with bucket_views():
        assert StrategyRegistry[name]["init_params"] == before | {"gradient_as_bucket_view": True}
    assert StrategyRegistry[name]["init_params"] == before
