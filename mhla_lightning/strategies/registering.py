"""The ZeRO presets in Lightning's StrategyRegistry, for `L.Trainer(strategy="zero2")`.

Lightning reads its registry while a Trainer is built, and `import mhla_lightning` must not import Lightning,
which takes seconds. So `mhla_lightning/__init__.py` calls :func:`enter` at once where Lightning is imported
already, and else :func:`entering` when it is.
"""

from __future__ import annotations

from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from mhla_lightning.strategies.config import ZERO

if TYPE_CHECKING:
    from mhla_lightning.strategies.zero.strategy import ZeroStrategy


def enter(module: Any) -> None:
    """Enter the presets into a registry; a name that another package has taken stays.

    Args:
        module: that holds `StrategyRegistry`.
    """
    for name in ZERO:
        if name not in module.StrategyRegistry:
            module.StrategyRegistry.register(name, _build, "a ZeRO preset of mhla_lightning", entry=name)


def entering(name: str) -> ModuleSpec | None:
    """Return what imports a module that holds a registry, and enters the presets into it."""
    spec = find_spec(name)
    loader: Any = spec.loader if spec is not None else None
    if loader is not None:
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            enter(module)

        loader.exec_module = exec_module
    return spec


def _build(entry: str) -> ZeroStrategy:
    from mhla_lightning.strategies.zero.strategy import ZeroStrategy

    return ZeroStrategy(entry)
