"""Assertions on a user's mistakes: type and key, not wording."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from mhla_lightning.errors import UserError


@contextmanager
def refused(key: str | None, kind: type[UserError] = UserError) -> Iterator[pytest.ExceptionInfo[UserError]]:
    """The block raises exactly `kind`, with exactly this key."""
    with pytest.raises(kind) as error:
        yield error
    assert type(error.value) is kind, error.value
    assert error.value.key == key, error.value
    assert error.value.reason
