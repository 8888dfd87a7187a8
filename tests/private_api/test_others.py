"""The private names of fsspec and lm_eval in use: an upgrade that moves one fails here."""

from __future__ import annotations

import pytest

from tests.helpers.installed import is_defined

# name -> (file below site-packages, its definition there, the place that uses it and why)
SYMBOLS: dict[str, tuple[str, str, str]] = {
    "_info": (
        "fsspec/asyn.py",
        r"async def _info\(",
        "data/stores/objects.py",
    ),
    "_cat_file": (
        "fsspec/asyn.py",
        r"async def _cat_file\(",
        "data/stores/objects.py",
    ),
    "_loglikelihood_tokens": (
        "lm_eval/api/model.py",
        r"def _loglikelihood_tokens\(",
        "evaluation/lm_harness.py overrides it",
    ),
}


@pytest.mark.parametrize("name", SYMBOLS)
def test_a_private_name_is_where_it_was(name: str) -> None:
    file, definition, use = SYMBOLS[name]
    assert is_defined(file, definition), f"{file} has no {name} any more; used by {use}"
