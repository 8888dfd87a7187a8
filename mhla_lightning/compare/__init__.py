"""Several runs side by side.

The package can be called: `mhla_lightning.compare(recipe, over=[...])` is the function of that name, which
importing the package would hide otherwise.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Compare variants of a recipe; see :func:`mhla_lightning.api.compare_recipe`."""
        import mhla_lightning

        return mhla_lightning.compare_recipe(*arguments, **options)


sys.modules[__name__].__class__ = _CallablePackage
