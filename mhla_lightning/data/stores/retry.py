"""Try again what may pass, and say the rest in one sentence."""

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
ADVICE = "check the network and the server, or raise data.remote.retries or data.remote.timeout"


class Failure(Exception):
    """One try that failed. what: the words for a message; advice: what to do about it; permanent: another
    try cannot help.
    """

    def __init__(self, what: str, advice: str = ADVICE, *, permanent: bool = False) -> None:
        super().__init__(what)
        self.what = what
        self.advice = advice
        self.permanent = permanent


class NoRanges(DataError):
    """The server answers every request with the whole file."""


def retrying(attempt: Callable[[], T], address: str, remote: Remote) -> T:
    """The result of `attempt`, tried 1 + remote.retries times while it raises a Failure that may pass.

    Raises DataError naming `address`, what happened last, how often and how long it was tried, and what to
    do.
    """
    began = time.monotonic()
    for tries in range(1, remote.retries + 2):
        try:
            return attempt()
        except Failure as failure:
            if failure.permanent:
                raise DataError(f"{address} cannot be read: {failure.what}; {failure.advice}") from failure
            if tries > remote.retries:
                took = f"after {tries} {'try' if tries == 1 else 'tries'} in {time.monotonic() - began:.0f} s"
                raise DataError(
                    f"{address} cannot be read: {failure.what} {took}; {failure.advice}"
                ) from failure
            pause = remote.pause(tries - 1, _share(address, tries))
            logger.warning(
                "%s: %s; try %d of %d in %.1f s", address, failure.what, tries + 1, remote.retries + 1, pause
            )
        time.sleep(pause)
    raise AssertionError("unreachable: the last try returns or raises")


def plain(text: str) -> str:
    """The first line of another library's message, without what may be secret in the urls it quotes."""
    line = (text.strip().splitlines() or [""])[0]
    return re.sub(r"\?[^\s'\")]*", "", re.sub(r"//[^/@\s]*@", "//", line))[:200]


def _share(address: str, tries: int) -> float:
    """This caller's place in the jitter, in [0, 1): spread over processes and files without drawing from
    anybody's random numbers.
    """
    return zlib.crc32(f"{os.getpid()} {address} {tries}".encode()) / 2**32
