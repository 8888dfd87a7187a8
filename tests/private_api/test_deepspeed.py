"""The private names of DeepSpeed 0.19 that the package uses: an upgrade that moves one fails here."""

from __future__ import annotations

import pytest

from tests.helpers.installed import is_defined

# name -> (file below site-packages, its definition there, the place that uses it and why)
SYMBOLS: dict[str, tuple[str, str, str]] = {
    "_hp_mapping": (
        "deepspeed/runtime/zero/stage_1_and_2.py",
        r"_hp_mapping is not None",
        "strategies/zero/patches.py: a parameter's float32 master",
    ),
    "_zero_padding": (
        "deepspeed/runtime/zero/stage_1_and_2.py",
        r"""getattr\(g, \"_zero_padding\", False\)""",
        "strategies/zero/patches.py: gradients that are padding",
    ),
    "_swap_in_pinned_gradients": (
        "deepspeed/runtime/swap_tensor/partitioned_optimizer_swapper.py",
        r"^    def _swap_in_pinned_gradients\(self, aio_handle, parameter, gradient_tensor\)",
        "strategies/zero/patches.py replaces it",
    ),
}


@pytest.mark.parametrize("name", SYMBOLS)
def test_a_private_name_is_where_it_was(name: str) -> None:
    file, definition, use = SYMBOLS[name]
    assert is_defined(file, definition), f"{file} has no {name} any more; used by {use}"
