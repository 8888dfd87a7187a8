"""The ZeRO presets in Lightning's StrategyRegistry, for `L.Trainer(strategy="zero2")`.

Lightning reads its registry while a Trainer is built, and `import mhla_lightning` must not import Lightning,
which takes seconds. The presets enter the registry at once where Lightning is imported already. Otherwise
they enter it when Lightning is imported: a finder in front of Python's own waits for that one module.

Imports only the standard library.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

    from mhla_lightning.strategies.zero.strategy import ZeroStrategy

_PLACE = "lightning.pytorch.strategies"


def register_presets() -> None:
    """Enter the presets into Lightning's registry, now or once Lightning is imported."""
    module = sys.modules.get(_PLACE)
    if module is not None:
        _enter(module)
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


class _Waiting:
    """A finder that acts once, when Lightning's strategies are imported."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _PLACE:
            return None
        from importlib.util import find_spec

        sys.meta_path.remove(self)  # type: ignore[arg-type]  # typeshed wants further methods
        spec = find_spec(name)
        loader: Any = spec.loader if spec is not None else None
        if loader is not None:
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _enter(module)

            loader.exec_module = exec_module
        return spec


def _enter(module: Any) -> None:
    """Enter the presets; a name that another package has taken stays."""
    from mhla_lightning.strategies.config import ZERO

    for name in ZERO:
        if name not in module.StrategyRegistry:
            module.StrategyRegistry.register(name, _build, "a ZeRO preset of mhla_lightning", entry=name)


def _build(entry: str) -> ZeroStrategy:
    from mhla_lightning.strategies.zero.strategy import ZeroStrategy

    return ZeroStrategy(entry)
