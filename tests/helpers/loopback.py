"""A pytest plugin: servers of shards on the loopback device, an HTTP server that misbehaves on request and
moto's S3 server.
"""

from __future__ import annotations

import hashlib
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from mhla_lightning.data.stores import CachedStore, Remote, Store, open_store

FAST = Remote(retries=2, timeout=0.5, backoff=0.01)
ONCE = Remote(retries=0, timeout=0.6)
NAME = "train-000000.tar"
BODY = bytes(range(256)) * 40  # 10,240 bytes, no two neighbours alike
# workers fork while the store's thread runs: see stores/io_thread.py
FORKS = "ignore:.*multi-threaded, use of fork:DeprecationWarning"


# In a process of its own: its threads use OpenSSL, and loader workers must not be forked while such a thread
# ends (stores/io_thread.py).
_MOTO = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


class FileServer(ThreadingHTTPServer):
    """Serves `files` (path -> bytes). `faults` are used up, one a request, and `faults_of` (path -> faults)
    before them.

    `log` holds (method, path, Range header) of every request.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.faults: list[str] = []
        self.faults_of: dict[str, list[str]] = {}
        self.log: list[tuple[str, str, str | None]] = []
        self.ranges = True
        self.stopping = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(
            sys.exception(), ConnectionError
        ):  # a client that gives up closes its side: that is what many tests are about
            super().handle_error(request, client_address)

    def bodies(self) -> int:
        return sum(method == "GET" for method, _, _ in self.log)

    def serve_folder(self, folder: Path) -> str:
        """Serve the files of a folder, as they are now; the folder's url."""
        self.files |= {
            f"/{path.relative_to(folder.parent)}": path.read_bytes()
            for path in folder.glob("*/*")
            if path.is_file()
        }
        return f"{self.url}/{folder.name}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FileServer

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        asked = self.headers.get("Range")
        self.server.log.append((self.command, path, asked))
        faults = self.server.faults_of.get(path) or self.server.faults
        fault = faults.pop(0) if faults else ""
        if fault == "stall":
            self.server.stopping.wait(20)
            self.close_connection = True
        elif fault == "reset":
            self._reset()
        elif fault.isdigit() or path not in self.server.files:
            self._answer(
                int(fault or 404), b"<Error><Code>SlowDown</Code></Error>" if fault == "503" else b"no"
            )
        elif "gzip" in self.headers.get("Accept-Encoding", ""):
            self._answer(500, b"asked for compression")
        else:
            self._serve(self.server.files[path], asked, fault)

    def _reset(self) -> None:
        """End the connection with a RST in place of an answer."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())
        self.close_connection = True

    def _serve(self, data: bytes, asked: str | None, fault: str) -> None:
        if asked is None or not self.server.ranges:
            return self._answer(200, data, fault)
        first, last = asked.removeprefix("bytes=").split("-")
        start, stop = int(first), min(len(data), int(last or len(data)) + 1)
        if start >= len(data):
            return self._answer(416, b"")
        return self._answer(206, data[start:stop], fault, f"bytes {start}-{stop - 1}/{len(data)}")

    def _answer(self, status: int, body: bytes, fault: str = "", content_range: str | None = None) -> None:
        if fault == "endless":
            return self._answer_without_end()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if content_range:
            self.send_header("Content-Range", content_range)
        self.end_headers()
        if self.command == "HEAD":
            return None
        if fault == "wrong":
            body = bytes(255 - byte for byte in body)
        self.wfile.write(body[: len(body) // 2] if fault in ("cut", "stall-body") else body)
        if fault in ("cut", "stall-body"):
            self.wfile.flush()
            self.close_connection = True
        if fault == "stall-body":
            self.server.stopping.wait(20)
        return None

    def _answer_without_end(self) -> None:
        """A body of any length: a file that is being written, a proxy's login page, an attack."""
        self.close_connection = True
        self.send_response(200)
        self.end_headers()
        while self.command == "GET" and not self.server.stopping.is_set():
            self.wfile.write(bytes(2**16))

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="session", autouse=True)
def no_proxy() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1,localhost")
        yield


@pytest.fixture
def server() -> Iterator[FileServer]:
    """A running FileServer with /data/NAME."""
    with FileServer() as running:
        running.files = {f"/data/{NAME}": BODY}
        thread = threading.Thread(target=running.serve_forever, args=(0.02,))
        thread.start()
        yield running
        running.stopping.set()
        running.shutdown()
        thread.join()


@pytest.fixture
def opened() -> Iterator[Callable[..., Store]]:
    """open_store, whose stores are closed at the end."""
    stores: list[Store] = []

    def open_(url: str | Path, remote: Remote = FAST) -> Store:
        stores.append(open_store(url, remote))
        return stores[-1]

    yield open_
    for store in stores:
        store.close()


@pytest.fixture(scope="module")
def s3_env() -> Iterator[None]:
    """Credentials that mean nothing."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "ACCESS_KEY_ID": "test",
            "SECRET_ACCESS_KEY": "test",
            "DEFAULT_REGION": "us-east-1",
            "EC2_METADATA_DISABLED": "true",
        }.items():
            patch.setenv(f"AWS_{name}", value)
        yield


@pytest.fixture(scope="module")
def bucket(s3_env: None) -> Iterator[S3Bucket]:
    """moto's S3 server with s3://bucket/data/NAME."""
    boto3 = pytest.importorskip("boto3")
    pytest.importorskip("moto.server")
    with subprocess.Popen(
        [sys.executable, "-c", _MOTO],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as moto:
        assert moto.stdout is not None
        endpoint = f"http://127.0.0.1:{int(moto.stdout.readline())}"
        client = boto3.client("s3", endpoint_url=endpoint)
        client.create_bucket(Bucket="bucket")
        client.put_object(Bucket="bucket", Key=f"data/{NAME}", Body=BODY)
        yield S3Bucket(endpoint, client)
        client.close()
        moto.kill()


class S3Bucket:
    """s3://bucket at `endpoint`."""

    def __init__(self, endpoint: str, client: Any) -> None:
        self.endpoint = endpoint
        self._client = client

    def upload(self, folder: Path) -> str:
        """Put the files of a folder there; the folder's address."""
        for path in folder.glob("*/*"):
            self._client.put_object(
                Bucket="bucket", Key=str(path.relative_to(folder.parent)), Body=path.read_bytes()
            )
        return f"s3://bucket/{folder.name}"


def entry(data: bytes) -> tuple[str, int]:
    return hashlib.sha256(data).hexdigest(), len(data)


def cached(
    inner: Store,
    folder: Path,
    max_bytes: int = 10**6,
    patience: float = 5.0,
    bodies: dict[str, bytes] | None = None,
) -> CachedStore:
    files = {name: entry(data) for name, data in (bodies or {NAME: BODY}).items()}
    return CachedStore(inner, files, folder, max_bytes, patience)


def one_sentence(error: BaseException) -> str:
    text = str(error)
    assert "\n" not in text
    assert "Traceback" not in text
    return text
