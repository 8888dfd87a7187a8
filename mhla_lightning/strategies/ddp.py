"""DDP whose gradients are views of its communication buckets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry


@contextmanager
def bucket_views() -> Iterator[None]:
    """Let a Trainer that is built in the block choose DDP with bucket views.

    Its gradients are views of the buckets. Otherwise every rank holds all gradients twice and copies them in
    every step. The strategy `auto` chooses DDP only while the Trainer is built, so a strategy object cannot
    be passed instead.
    """
    names = [name for name, entry in StrategyRegistry.items() if entry["strategy"] is DDPStrategy]
    before = {name: dict(StrategyRegistry[name]["init_params"]) for name in names}
    for name in names:
        StrategyRegistry[name]["init_params"] |= {"gradient_as_bucket_view": True}
    try:
        yield
    finally:
        for name in names:
            StrategyRegistry[name]["init_params"] = before[name]
