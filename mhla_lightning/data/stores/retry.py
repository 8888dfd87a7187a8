"""Retries of failures that may pass; other failures become one short error."""

from __future__ import annotations

import logging
import os
import re
import time
import zlib
from collections.abc import Callable
from typing import TypeVar

from mhla_lightning.data.stores.settings import Remote
from mhla_lightning.errors import DataError

T = TypeVar("T")
logger = logging.getLogger(__name__)
ADVICE = (
    "check the network and the server, or raise `data.reading.remote.retries` or "
    "`data.reading.remote.timeout`"
)


class Failure(Exception):
    """One try that failed.

    Args:
        what: the problem, for a message.
        advice: a remedy, for a message.
        permanent: whether another try cannot help.
    """

    def __init__(self, what: str, advice: str = ADVICE, *, permanent: bool = False) -> None:
        super().__init__(what)
        self.what = what
        self.advice = advice
        self.permanent = permanent


class NoRanges(DataError):
    """The server answers every request with the whole file."""


def retrying(attempt: Callable[[], T], address: str, remote: Remote) -> T:
    """Return the result of `attempt`, repeated after a Failure that may pass.

    There are at most remote.retries repetitions.
    Raises DataError for `address`, with the last problem, the number of tries, their time, and a remedy.
    """
    began = time.monotonic()
    for tries in range(1, remote.retries + 2):
        try:
            return attempt()
        except Failure as failure:
            if failure.permanent:
                raise DataError(address, f"it cannot be read: {failure.what}; {failure.advice}") from failure
            if tries > remote.retries:
                took = f"after {tries} {'try' if tries == 1 else 'tries'} in {time.monotonic() - began:.0f} s"
                raise DataError(
                    address, f"it cannot be read: {failure.what} {took}; {failure.advice}"
                ) from failure
            pause = remote.pause(tries - 1, _share(address, tries))
            logger.warning(
                "%s: %s; try %d of %d in %.1f s", address, failure.what, tries + 1, remote.retries + 1, pause
            )
        time.sleep(pause)
    raise AssertionError("unreachable: the last try returns or raises")


def plain(text: str) -> str:
    """Return the first line of another library's message, without secrets in the URLs it quotes."""
    line = (text.strip().splitlines() or [""])[0]
    return re.sub(r"\?[^\s'\")]*", "", re.sub(r"//[^/@\s]*@", "//", line))[:200]


def _share(address: str, tries: int) -> float:
    """Return this caller's place in the jitter, in [0, 1).

    It differs between processes and files, and changes no random generator.
    """
    return zlib.crc32(f"{os.getpid()} {address} {tries}".encode()) / 2**32
