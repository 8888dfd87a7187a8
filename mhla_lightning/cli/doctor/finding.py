"""What a check reports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Args:
        status: warn: works, but not as meant; fail: something will not work.
        detail: one sentence, with the fix where there is one.
    """

    status: Status
    detail: str
