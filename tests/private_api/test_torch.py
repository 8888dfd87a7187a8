"""The private names of torch 2.14 that the package uses: an upgrade that moves one fails here."""

from __future__ import annotations

import pytest

from tests.helpers.installed import is_defined

# name -> (file below site-packages, its definition there, the place that uses it and why)
SYMBOLS: dict[str, tuple[str, str, str]] = {
    "_foreach_norm": (
        "torch/_C/_VariableFunctions.pyi",
        r"^def _foreach_norm\(",
        "strategies/norm.py: all tensors in one call, in float64",
    ),
    "_subclasses": (
        "torch/_subclasses/fake_tensor.py",
        r"^class FakeTensorMode",
        "planning/torch_modes.py: tensors without memory",
    ),
    "_python_dispatch": (
        "torch/utils/_python_dispatch.py",
        r"^class TorchDispatchMode",
        "planning/torch_modes.py: counts operations",
    ),
    "_metadata": (
        "torch/nn/modules/module.py",
        r"destination\._metadata = OrderedDict\(\)",
        "weights/adapted.py: the token grid that a state dict was written with",
    ),
    "_shutdown_workers": (
        "torch/utils/data/dataloader.py",
        r"^    def _shutdown_workers\(self\)",
        "data/loader.py",
    ),
}


@pytest.mark.parametrize("name", SYMBOLS)
def test_a_private_name_is_where_it_was(name: str) -> None:
    file, definition, use = SYMBOLS[name]
    assert is_defined(file, definition), f"{file} has no {name} any more; used by {use}"
