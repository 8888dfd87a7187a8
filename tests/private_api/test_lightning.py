"""The private names of Lightning 2.6 that the package uses: an upgrade that moves one fails here."""

from __future__ import annotations

import pytest

from tests.helpers.installed import is_defined

# name -> (file below site-packages, its definition there, the place that uses it and why)
SYMBOLS: dict[str, tuple[str, str, str]] = {
    "_batches_that_stepped": (
        "lightning/pytorch/loops/training_epoch_loop.py",
        r"^\s+self\._batches_that_stepped: int = 0",
        "callbacks/checkpoint.py: whether the loggers have a step's numbers",
    ),
    "_signal_connector": (
        "lightning/pytorch/trainer/trainer.py",
        r"^\s+self\._signal_connector = _SignalConnector\(self\)",
        "callbacks/preemption.py: its SIGTERM handler broadcasts",
    ),
    "_format_config": (
        "lightning/pytorch/strategies/deepspeed.py",
        r"^    def _format_config\(self\)",
        "strategies/zero/strategy.py overrides it",
    ),
    "_setup_model_and_optimizer": (
        "lightning/pytorch/strategies/deepspeed.py",
        r"^    def _setup_model_and_optimizer\(",
        "strategies/zero/strategy.py overrides it",
    ),
    "_get_train_description": (
        "lightning/pytorch/callbacks/progress/rich_progress.py",
        r"^    def _get_train_description\(self, current_epoch",
        "callbacks/progress.py overrides it",
    ),
}


@pytest.mark.parametrize("name", SYMBOLS)
def test_a_private_name_is_where_it_was(name: str) -> None:
    file, definition, use = SYMBOLS[name]
    assert is_defined(file, definition), f"{file} has no {name} any more; used by {use}"
