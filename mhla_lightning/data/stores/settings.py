"""The section `data.reading.remote` of a recipe: retries, time-outs and cache. No torch."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass

from mhla_lightning.errors import UserError

_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{suffix}": base**power
    for suffix, base in (("B", 1000), ("iB", 1024))
    for power, prefix in enumerate("KMGT", start=1)
}
# Seconds. A server that needs longer is down, and more tries show that sooner than longer pauses.
_LONGEST_PAUSE = 30.0


@dataclass(frozen=True)
class Remote:
    """Options for fetching shards over http(s), s3 and gs.

    Args:
        retries: tries after the first, for failures that may pass: timeouts, broken connections, HTTP 5xx
            and 429, short answers.
        timeout: seconds for one request, with connecting and reading up to 8 MiB. A whole file without
            ranges may take longer, but may not pause longer.
        backoff: seconds before the first retry, doubled each time up to 30. Ranks wait 50 to 100 % of it, so
            that they do not return together.
        cache_dir: folder for whole shards (~ and $VARIABLES are expanded), best on the node's own disk; None
            is no cache.
        cache_bytes: size limit of the folder: a number of bytes, or a text such as "64GB" (10**9) or "64GiB"
            (2**30).
        endpoint: URL of an S3-compatible (or GS-compatible) server; None follows botocore's own rules, among
            them AWS_ENDPOINT_URL.
        anonymous: whether s3 and gs are read without credentials.
    """

    retries: int = 5
    timeout: float = 60.0
    backoff: float = 0.5
    cache_dir: str | None = None
    cache_bytes: int | str = "64GB"
    endpoint: str | None = None
    anonymous: bool = False

    def __post_init__(self) -> None:
        """Raise UserError for a value outside its range."""
        _require(
            _is_number(self.retries) and self.retries == int(self.retries) and self.retries >= 0,
            "retries",
            self.retries,
            "an integer from 0 on",
        )
        _require(_is_number(self.timeout) and self.timeout > 0, "timeout", self.timeout, "seconds above 0")
        _require(_is_number(self.backoff) and self.backoff >= 0, "backoff", self.backoff, "seconds from 0 on")
        _require(
            self.cache_dir is None or (isinstance(self.cache_dir, str) and self.cache_dir.strip() != ""),
            "cache_dir",
            self.cache_dir,
            "a folder or null",
        )
        _require(
            self.cache_limit > 0,
            "cache_bytes",
            self.cache_bytes,
            "a size above 0, such as 64000000000, '64GB' or '64GiB'",
        )
        web = isinstance(self.endpoint, str) and re.match(r"https?://[^/\s]", self.endpoint) is not None
        _require(
            self.endpoint is None or web,
            "endpoint",
            self.endpoint,
            "null or a URL that begins with http:// or https://",
        )
        _require(isinstance(self.anonymous, bool), "anonymous", self.anonymous, "true or false")

    @property
    def cache_limit(self) -> int:
        """`cache_bytes` as a number of bytes; 0 when it is not a size."""
        if isinstance(self.cache_bytes, str):
            match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", self.cache_bytes)
            return int(float(match[1]) * _UNITS[match[2]]) if match and match[2] in _UNITS else 0
        return int(self.cache_bytes) if _is_number(self.cache_bytes) else 0

    @property
    def patience(self) -> float:
        """Seconds until the last try of one block has failed; others wait so long for progress."""
        return (
            (self.retries + 1) * self.timeout
            + sum(self.pause(attempt, 1.0) for attempt in range(self.retries))
            + 10.0
        )

    def pause(self, attempt: int, share: float) -> float:
        """Return the seconds to wait after the failed try number `attempt`, counted from 0.

        share: this caller's place in the jitter, from 0 to 1.
        """
        return min(_LONGEST_PAUSE, self.backoff * 2.0 ** min(attempt, 60)) * (0.5 + 0.5 * share)

    def cache_folder(self) -> str | None:
        """Return `cache_dir` with ~ and environment variables filled in on this machine.

        Raises UserError when a variable is not set.
        """
        if self.cache_dir is None:
            return None
        folder = os.path.expanduser(os.path.expandvars(self.cache_dir))
        _require(
            "$" not in folder,
            "cache_dir",
            self.cache_dir,
            "a folder whose environment variables are set on this machine",
        )
        return folder


def _require(holds: bool, field: str, found: object, allowed: str) -> None:
    if not holds:
        raise UserError(f"reading.remote.{field}", f"{found!r} is not allowed; allowed: {allowed}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
