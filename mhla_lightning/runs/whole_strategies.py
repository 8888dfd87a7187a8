"""The strategies of Lightning that keep all weights on every rank."""

from __future__ import annotations

from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    SingleDeviceStrategy,
    SingleDeviceXLAStrategy,
    XLAStrategy,
)

_WHOLE = (SingleDeviceStrategy, DDPStrategy)
_SPLIT = (DeepSpeedStrategy, XLAStrategy, SingleDeviceXLAStrategy)  # subclasses of those in _WHOLE


def holds_whole(strategy: type) -> bool:
    """Whether every rank of a strategy of Lightning's holds all weights."""
    return issubclass(strategy, _WHOLE) and not issubclass(strategy, _SPLIT)
