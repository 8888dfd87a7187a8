"""Parametrisations of which `make test` runs some cases and `make slow` the others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def every_nth(values: Iterable[Any], n: int, several: bool = False) -> list[Any]:
    """Return the values as parameters; all but the first and every n-th after it are slow.

    Args:
        values: one a case.
        n: of so many, one is not slow.
        several: a value is a tuple of several parameters.
    """
    return [
        value if number % n == 0 else pytest.param(*(value if several else (value,)), marks=pytest.mark.slow)
        for number, value in enumerate(values)
    ]
