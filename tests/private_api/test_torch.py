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
    "_C": (
        "torch/_C/__init__.pyi",
        r"^def _current_graph_task_id\(",
        "attention/layers/outputs.py",
    ),
    "_current_graph_task_id": (
        "torch/_C/__init__.pyi",
        r"^def _current_graph_task_id\(",
        "attention/layers/outputs.py",
    ),
    "_subclasses": (
        "torch/_subclasses/fake_tensor.py",
        r"^class FakeTensorMode",
        "planning/step_memory.py, bench/backbone_speed.py: tensors without memory",
    ),
    "_tools": (
        "torch/distributed/_tools/mem_tracker.py",
        r"^class MemTracker",
        "planning/memory.py: counts bytes of tensors",
    ),
    "_mod_tracker": (
        "torch/distributed/_tools/mem_tracker.py",
        r"self\._mod_tracker = ModTracker\(\)",
        "planning/memory.py",
    ),
    "_fw_pre_hook": (
        "torch/distributed/_tools/mod_tracker.py",
        r"def _fw_pre_hook\(",
        "planning/memory.py overrides it",
    ),
    "_fw_post_hook": (
        "torch/distributed/_tools/mod_tracker.py",
        r"def _fw_post_hook\(",
        "planning/memory.py overrides it",
    ),
    "_python_dispatch": (
        "torch/utils/_python_dispatch.py",
        r"^class TorchDispatchMode",
        "planning/step_memory.py",
    ),
    "_pytree": (
        "torch/utils/_pytree.py",
        r"^def tree_leaves\(",
        "planning/step_memory.py",
    ),
    "_iterator": (
        "torch/utils/data/dataloader.py",
        r"^\s+self\._iterator = None",
        "data/loader.py: workers of a loader",
    ),
    "_shutdown_workers": (
        "torch/utils/data/dataloader.py",
        r"^    def _shutdown_workers\(self\)",
        "data/loader.py",
    ),
    "_workers": (
        "torch/utils/data/dataloader.py",
        r"^\s+self\._workers = \[\]",
        "data/loader.py",
    ),
}


@pytest.mark.parametrize("name", SYMBOLS)
def test_a_private_name_is_where_it_was(name: str) -> None:
    file, definition, use = SYMBOLS[name]
    assert is_defined(file, definition), f"{file} has no {name} any more; used by {use}"
