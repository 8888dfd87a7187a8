"""The compiled form of MHLA on CPUs in tests."""

from __future__ import annotations

import pytest

from mhla_lightning.attention.mhla.cpu import building


def needs_a_compiler() -> None:
    """Skip where this machine cannot compile `dense.cpp`; with a compiler it has to."""
    if building.find_compiler() is None:
        pytest.skip("needs a C++ compiler, such as g++")
    assert building.loaded() is None
