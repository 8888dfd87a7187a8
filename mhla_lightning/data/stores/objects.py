"""Objects in s3 (s3fs) and gs (gcsfs): single requests, without the libraries' own retries."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import aiohttp

from mhla_lightning.data.stores.addresses import Address
from mhla_lightning.data.stores.clients import failure, status_failure
from mhla_lightning.data.stores.retry import Failure, plain
from mhla_lightning.data.stores.settings import Remote
from mhla_lightning.errors import UserError, missing_extra

_LOGIN = "set the credentials, or `data.reading.remote.anonymous` to true for public data"


class ObjectClient:
    """Files below BUCKET/FOLDER.

    The requests are underscored methods of fsspec (version 2026.9). Its manual documents these names as the
    asynchronous interface; the names without underscore run on fsspec's own event loop (see io_thread.py).

    Args:
        address: of the folder.
        remote: whose timeout counts.
        fs: an asynchronous fsspec file system.
        errors: exceptions of its requests, beside OSError and those of aiohttp.
        session: returns the open session of `fs`; raises RuntimeError before the first request.
    """

    def __init__(
        self,
        address: Address,
        remote: Remote,
        fs: Any,
        errors: tuple[type[Exception], ...],
        session: Callable[[], Any],
    ) -> None:
        self._address = address
        self._timeout = remote.timeout
        self._fs = fs
        self._session = session
        self._errors: tuple[type[Exception], ...] = (OSError, ValueError, aiohttp.ClientError, *errors)

    async def size(self, name: str) -> int | None:
        try:
            info = await self._fs._info(self._address.key(name))
        except FileNotFoundError:
            return None
        except self._errors as error:
            raise _failure(error, self._timeout) from error
        # A common prefix of keys counts as a folder, of size 0.
        return int(info["size"]) if info["type"] == "file" else None

    async def read(self, name: str, start: int, stop: int) -> bytes:
        try:
            data: bytes = await self._fs._cat_file(self._address.key(name), start=start, end=stop)
        except self._errors as error:
            raise _failure(error, self._timeout) from error
        if len(data) != stop - start:
            raise Failure(f"short answer: {len(data)} of {stop - start} bytes")
        return data

    async def close(self) -> None:
        with contextlib.suppress(RuntimeError):  # there was no request, so there is no session
            await self._session().close()


def s3_client(address: Address, remote: Remote) -> ObjectClient:
    """Make a client for s3://. Raises UserError when s3fs is not installed."""
    try:
        import s3fs
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError as error:
        raise UserError(None, missing_extra("s3fs", "s3", f"reading {address.shown()}")) from error
    limits: dict[str, Any] = {"connect_timeout": remote.timeout, "read_timeout": remote.timeout}
    # Only retry.py counts tries.
    limits |= {"retries": {"total_max_attempts": 1}, "max_pool_connections": 16}
    fs = s3fs.S3FileSystem(
        anon=remote.anonymous,
        endpoint_url=remote.endpoint,
        config_kwargs=limits,
        max_concurrency=1,
        asynchronous=True,
        skip_instance_cache=True,
    )
    fs.retries = 1
    return ObjectClient(address, remote, fs, (BotoCoreError, ClientError), lambda: fs.s3)


def gs_client(address: Address, remote: Remote) -> ObjectClient:
    """Make a client for gs://. Raises UserError without gcsfs or without credentials."""
    try:
        # Not gcsfs.GCSFileSystem: it may start gRPC, which does not survive a fork.
        from gcsfs.core import GCSFileSystem
        from gcsfs.retry import ChecksumError, HttpError
        from google.auth.exceptions import GoogleAuthError
    except ImportError as error:
        raise UserError(None, missing_extra("gcsfs", "gs", f"reading {address.shown()}")) from error
    try:
        fs = GCSFileSystem(
            token="anon" if remote.anonymous else None,
            endpoint_url=remote.endpoint,
            requests_timeout=remote.timeout,
            asynchronous=True,
            skip_instance_cache=True,
        )
    except (GoogleAuthError, ValueError) as error:
        raise UserError(
            address.shown(), f"it cannot be read: no Google credentials ({plain(str(error))}); {_LOGIN}"
        ) from error
    return ObjectClient(address, remote, fs, (ChecksumError, HttpError, GoogleAuthError), lambda: fs.session)


def _failure(error: Exception, timeout: float) -> Failure:
    """Return the Failure for an error of s3fs, botocore or gcsfs."""
    status = _status(error)
    if status == 416:
        return Failure(
            "it ends before the bytes asked for", "it was cut or replaced; copy it again", permanent=True
        )
    if status is not None:
        return status_failure(status)
    if "Credential" in type(error).__name__ or "Profile" in type(error).__name__:
        return Failure(f"no credentials ({plain(str(error))})", _LOGIN, permanent=True)
    if isinstance(error, ValueError) and not isinstance(error, OSError):
        return Failure(
            plain(str(error)), "check the address and `data.reading.remote.endpoint`", permanent=True
        )
    return failure(error, timeout)


def _status(error: Exception) -> int | None:
    """Return the HTTP status behind an error, None without one.

    s3fs translates botocore's error and keeps it as the cause; gcsfs has a code or only words.
    """
    for found in (error, error.__cause__):
        response = getattr(found, "response", None)
        if isinstance(response, dict) and "HTTPStatusCode" in response.get("ResponseMetadata", {}):
            return int(response["ResponseMetadata"]["HTTPStatusCode"])
    code = getattr(error, "code", None)
    if isinstance(code, int) or (isinstance(code, str) and code.isdigit()):
        return int(code)
    if isinstance(error, FileNotFoundError):
        return 404
    return 403 if isinstance(error, PermissionError) or str(error).startswith("Forbidden") else None
