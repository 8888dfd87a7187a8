"""Count of samples that cannot be used."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from mhla_lightning.data.members import RawSample
from mhla_lightning.errors import DataError

JUDGED_AFTER = 100  # samples read before a share of bad ones means anything
_log = logging.getLogger(__name__)


class BadSample(Exception):
    """A sample that cannot be used; it is skipped and counted."""


@dataclass
class SkipMeter:
    """The samples that one worker has read and skipped.

    It ends the run above a share of bad samples.

    Args:
        limit: largest share of skipped samples.
        judged_after: samples read before the share counts.
    """

    limit: float
    judged_after: int = JUDGED_AFTER
    read: int = 0
    skipped: int = 0
    _reported: int = 0
    _last: str = ""
    _last_shard: str | None = None

    def good(self) -> None:
        """Count a sample that was decoded."""
        self.read += 1

    def bad(self, sample: RawSample, reason: BadSample) -> None:
        """Count a skipped sample. Raises DataError when the share is over the limit."""
        self.read += 1
        self.skipped += 1
        self._last, self._last_shard = f"the last is {sample['__key__']} ({reason})", sample["__url__"]
        _log.warning("skipped %s of %s: %s", sample["__key__"], sample["__url__"], reason)
        if self.read >= self.judged_after:
            self.judge()

    def judge(self) -> None:
        """Raise DataError when the share is over the limit, or when nothing at all could be decoded."""
        share = self.skipped / max(self.read, 1)
        if self.skipped and (share > self.limit or self.skipped == self.read):
            found = f"{self.skipped} of {self.read} samples ({share:.1%}) cannot be decoded"
            raise DataError(
                self._last_shard,
                f"{found}, more than `data.reading.max_skipped_share` {self.limit:g} allows; {self._last}",
            )

    def take(self) -> int:
        """Return the samples skipped since the last call."""
        fresh, self._reported = self.skipped - self._reported, self.skipped
        return fresh
