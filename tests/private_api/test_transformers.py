"""The private names of transformers 5 that the package uses: an upgrade that moves one fails here."""

from __future__ import annotations

import pytest

from tests.helpers.installed import is_defined

# name -> (file below site-packages, its definition there, the place that uses it and why)
SYMBOLS: dict[str, tuple[str, str, str]] = {
    "_is_hf_initialized": (
        "transformers/modeling_utils.py",
        r"""getattr\(module, \"_is_hf_initialized\", False\)""",
        "integrations/transformers.py: weights that need no initialisation",
    ),
    "_supports_default_dynamic_cache": (
        "transformers/generation/utils.py",
        r"def _supports_default_dynamic_cache\(",
        "integrations/transformers.py overrides it",
    ),
    "_init_weights": (
        "transformers/modeling_utils.py",
        r"^    def _init_weights\(",
        "integrations/transformers.py overrides it",
    ),
}


@pytest.mark.parametrize("name", SYMBOLS)
def test_a_private_name_is_where_it_was(name: str) -> None:
    file, definition, use = SYMBOLS[name]
    assert is_defined(file, definition), f"{file} has no {name} any more; used by {use}"
