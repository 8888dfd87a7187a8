"""Single requests over HTTP by aiohttp, without retries; errors become a Failure.

HTTP does not use fsspec. Its HTTP file system hides the status, so that a server that ignores Range is
misread. It also reports every error of a size request as "file not found", lets aiohttp decompress bodies,
and ignores the proxy variables of the environment.
"""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
from typing import Any, Protocol

import aiohttp
from yarl import URL

from mhla_lightning.data.stores.addresses import Address
from mhla_lightning.data.stores.retry import Failure, plain
from mhla_lightning.data.stores.settings import Remote

NO_RANGES = "the server does not serve byte ranges"
_MISSING = (404, 410)


class RemoteClient(Protocol):
    """Single requests for files by their checked plain names.

    size() returns None for a missing file; every other problem raises Failure.
    """

    async def size(self, name: str) -> int | None: ...

    async def read(self, name: str, start: int, stop: int) -> bytes: ...

    async def close(self) -> None: ...


class HttpClient:
    """Files below an http(s) address."""

    def __init__(self, address: Address, remote: Remote) -> None:
        self._address = address
        self._timeout = remote.timeout
        self._session: aiohttp.ClientSession | None = None

    async def size(self, name: str) -> int | None:
        async with await self._ask("HEAD", name) as answer:
            if answer.status in _MISSING:
                return None
            length = answer.headers.get("Content-Length")
            if answer.status == 200 and length is not None:
                return int(length)
            _raise_if_passing(answer.status)
        return await self._size_by_get(name)

    async def read(self, name: str, start: int, stop: int) -> bytes:
        async with await self._ask("GET", name, {"Range": f"bytes={start}-{stop - 1}"}) as answer:
            if answer.status == 200 and not (
                start == 0 and answer.headers.get("Content-Length") == str(stop)
            ):
                raise Failure(NO_RANGES, permanent=True)
            if answer.status == 416:
                raise Failure(
                    f"it ends before byte {stop}", "it was cut or replaced; copy it again", permanent=True
                )
            _raise_for_status(answer.status)
            if answer.status == 206 and _first_byte(answer) != start:
                raise Failure(f"the answer begins at byte {_first_byte(answer)} where {start} was asked for")
            return await self._body(answer, stop - start)

    async def begin(self, name: str) -> aiohttp.ClientResponse:
        """Request a whole file and return the answer; read its body with piece()."""
        answer = await self._ask("GET", name)
        try:
            _raise_for_status(answer.status)
        except Failure:
            answer.close()
            raise
        return answer

    async def piece(self, answer: aiohttp.ClientResponse) -> bytes:
        """Return the next at most 1 MiB of the body; empty at its end."""
        try:
            return await answer.content.read(2**20)
        except (OSError, aiohttp.ClientError) as error:
            raise failure(error, self._timeout) from error

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def _ask(
        self, method: str, name: str, headers: dict[str, str] | None = None
    ) -> aiohttp.ClientResponse:
        if self._session is None:
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=self._timeout, sock_read=self._timeout)
            # Sizes and offsets count the bytes on the server, so nothing may be compressed on the way.
            # Without trust_env, aiohttp ignores the proxy variables.
            identity = {"Accept-Encoding": "identity"}
            self._session = aiohttp.ClientSession(
                timeout=timeout, headers=identity, auto_decompress=False, trust_env=True
            )
        try:
            return await self._session.request(
                method,
                URL(self._address.requested(name), encoded=True),
                headers=headers,
                allow_redirects=True,
            )
        except (OSError, aiohttp.ClientError) as error:
            raise failure(error, self._timeout) from error

    async def _body(self, answer: aiohttp.ClientResponse, expected: int) -> bytes:
        pieces, found = [], 0
        while found <= expected and (piece := await self._counted(answer, found, expected)):
            pieces.append(piece)
            found += len(piece)
        if found != expected:
            raise Failure(f"{'short' if found < expected else 'long'} answer: {found} of {expected} bytes")
        return b"".join(pieces)

    async def _counted(self, answer: aiohttp.ClientResponse, found: int, expected: int) -> bytes:
        try:
            return await self.piece(answer)
        except Failure as cut:
            if isinstance(cut.__cause__, TimeoutError):
                raise
            raise Failure(f"short answer: {found} of {expected} bytes") from cut

    async def _size_by_get(self, name: str) -> int | None:
        """Return the size by GET, for servers that refuse HEAD and addresses signed for GET only."""
        async with await self._ask("GET", name, {"Range": "bytes=0-0"}) as answer:
            if answer.status in _MISSING:
                return None
            total = re.fullmatch(r"bytes (?:\d+-\d+|\*)/(\d+)", answer.headers.get("Content-Range", ""))
            if answer.status in (206, 416) and total:
                return int(total[1])
            _raise_for_status(answer.status)
            length = answer.headers.get("Content-Length")
            if answer.status != 200 or length is None:
                raise Failure(
                    "the server does not send its size",
                    "serve it from a server that sends Content-Length",
                    permanent=True,
                )
            return int(length)


def _first_byte(answer: aiohttp.ClientResponse) -> int | None:
    found = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range", ""))
    return int(found[1]) if found else None


def _raise_for_status(status: int) -> None:
    _raise_if_passing(status)
    if status not in (200, 206):
        raise status_failure(status)


def _raise_if_passing(status: int) -> None:
    if status in (408, 425, 429) or status >= 500 and status != 501:
        raise status_failure(status)


def status_failure(status: int) -> Failure:
    """Return the Failure for an HTTP status that is no success."""
    if status in _MISSING:
        return Failure(
            f"HTTP {status}, there is no such file",
            "check the address or copy the file there",
            permanent=True,
        )
    if status in (401, 403):
        return Failure(
            f"HTTP {status}, access refused",
            "check the credentials, the file's name or `data.reading.remote.anonymous`",
            permanent=True,
        )
    passing = status in (408, 425, 429) or (status >= 500 and status != 501)
    return (
        Failure(f"HTTP {status}")
        if passing
        else Failure(f"HTTP {status}", "check the address", permanent=True)
    )


def failure(error: BaseException, timeout: float) -> Failure:
    """Return the Failure for an exception of the network, whichever library wrapped it.

    timeout: seconds of one request.
    """
    for cause in _chain(error):
        if isinstance(cause, ssl.SSLCertVerificationError):
            return Failure(
                "its certificate is not trusted",
                "check the address and the machine's certificates",
                permanent=True,
            )
        if isinstance(cause, socket.gaierror):
            return Failure("unknown host")
        if isinstance(cause, ConnectionRefusedError):
            return Failure("connection refused")
        if isinstance(cause, (TimeoutError, asyncio.TimeoutError)) or "Timeout" in type(cause).__name__:
            return Failure(f"timed out after {timeout:g} s")
        if isinstance(cause, (ConnectionResetError, BrokenPipeError, aiohttp.ServerDisconnectedError)):
            return Failure("the server closed the connection")
        if isinstance(cause, aiohttp.ClientPayloadError):
            return Failure("short answer: the body was cut")
    text = plain(str(error))
    return Failure(f"{type(error).__name__}{f' ({text})' if text else ''}")


def _chain(error: BaseException) -> list[Any]:
    """Return the error and its causes: libraries wrap the informative one."""
    found: list[Any] = []
    current: BaseException | None = error
    while current is not None and current not in found:
        found.append(current)
        current = getattr(current, "os_error", None) or current.__cause__ or current.__context__
    return found
