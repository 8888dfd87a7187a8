"""Addresses and settings, local folders, and HTTP against a real server on the loopback device."""

from __future__ import annotations

import hashlib
import io
import logging
import multiprocessing
import os
import pickle
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from mhla_lightning.data.stores import LocalStore, Remote, Store, open_store
from mhla_lightning.data.stores.remote import BLOCK, RemoteStore
from mhla_lightning.data.stores.retry import NoRanges
from mhla_lightning.errors import DataError, UserError
from tests.helpers.errors import refused
from tests.helpers.loopback import BODY, FORKS, NAME, ONCE, FileServer, cached, entry, one_sentence

# ---- addresses and settings


@pytest.mark.parametrize(
    "url",
    [
        "pipe:cat /etc/passwd",
        "pipe:cat x|",
        "| cat x",
        "cat x |",
        "ftp://host/x",
        "hdfs://x",
        "s3:/bucket/x",
        "memory://x",
        "simplecache::s3://b/x",
        "http://h/a b",
        "http://host/a/../b",
        "s3://bucket/%2e%2e/x",
        "s3://",
        "s3:///x",
        "http://",
        "http://host:port/x",
        "file://other/x",
        "s3://key:secret@bucket/x",
        "",
        " /data",
        "/data\n",
    ],
)
def test_refused_addresses(url: str) -> None:
    with pytest.raises(UserError) as caught:
        open_store(url)
    assert "secret" not in one_sentence(caught.value)


def test_the_refusal_lists_what_is_allowed() -> None:
    """The list of protocols is the point of this message, so its wording is asserted."""
    with refused("ftp://host/x") as caught:
        open_store("ftp://host/x")
    assert "a local folder, file://, http://, https://, s3:// and gs://" in caught.value.reason


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../x", "a/../x", "a//b", "./a", "", "pipe:x", "a|", "a\\b", "a\n"]
)
def test_refused_names(name: str, tmp_path: Path) -> None:
    for store in (LocalStore(tmp_path), RemoteStore("http://127.0.0.1:9/x", ONCE)):
        for use in (store.size, store.read, store.open):
            with refused(repr(name)):
                use(name)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("retries", -1),
        ("retries", 1.5),
        ("retries", True),
        ("timeout", 0),
        ("timeout", float("inf")),
        ("backoff", -1),
        ("cache_dir", " "),
        ("cache_bytes", "many"),
        ("cache_bytes", "5XB"),
        ("cache_bytes", 0),
        ("endpoint", "host:9000"),
        ("anonymous", "yes"),
    ],
)
def test_wrong_settings_name_the_key(field: str, value: Any) -> None:
    with refused(f"reading.remote.{field}"):
        Remote(**{field: value})


def test_cache_sizes_and_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = (50_000_000_000, "50GB", "50 GiB", "1.5KB", "7")
    assert [Remote(cache_bytes=size).cache_limit for size in sizes] == [
        50 * 10**9,
        50 * 10**9,
        50 * 2**30,
        1500,
        7,
    ]
    assert [Remote().pause(attempt, 1.0) for attempt in (0, 1, 2, 20)] == [0.5, 1.0, 2.0, 30.0]
    assert Remote().pause(0, 0.0) == 0.25
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    assert Remote(cache_dir="$SCRATCH/cache").cache_folder() == "/scratch/me/cache"
    with refused("reading.remote.cache_dir"):
        Remote(cache_dir="$NOT_SET_HERE/x").cache_folder()


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for package, module, url in (("s3fs", "s3fs", "s3://b/x"), ("gcsfs", "gcsfs.core", "gs://b/x")):
        monkeypatch.setitem(sys.modules, module, None)
        with refused(None) as caught:
            open_store(url)
        assert f"'{package}'" in caught.value.reason
        assert f"mhla-lightning[{url[:2]}]" in caught.value.reason


def test_stores_import_without_torch_and_local_ones_without_aiohttp() -> None:
    code = (
        "import sys, mhla_lightning.data.stores as s; s.open_store('/tmp'); print([m for m in ('torch', "
        "'lightning', 'aiohttp') if m in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "[]\n"
    )


# ---- local folders


def test_local_ranges(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(BODY)
    for store in (open_store(tmp_path), open_store(f"file://{tmp_path}")):
        assert store.size(NAME) == len(BODY)
        assert store.size("other.tar") is None
        assert store.read(NAME) == BODY
        assert store.read(NAME, 10_000) == BODY[10_000:]
        assert store.read_many([(NAME, 5, 9), (NAME, 0, 0), (NAME, 300, 700)]) == [
            BODY[5:9],
            b"",
            BODY[300:700],
        ]
        with store.open(NAME) as file:
            assert file.seek(100) == 100
            assert file.read(3) == BODY[100:103]
        with refused(store.address(NAME), DataError):
            store.read(NAME, 10_000, 10_241)
        with refused(store.address("x.tar"), DataError):
            store.read("x.tar")


def test_local_descriptors_are_few_and_follow_replaced_files(tmp_path: Path) -> None:
    for n in range(100):
        (tmp_path / f"{n}.tar").write_bytes(b"%03d" % n)
    store = LocalStore(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    assert [store.read(f"{n}.tar", 0, 3) for n in range(100)] == [b"%03d" % n for n in range(100)]
    assert len(os.listdir("/proc/self/fd")) - before <= 64
    (tmp_path / "new").write_bytes(b"longer")
    (tmp_path / "new").replace(tmp_path / "99.tar")
    assert store.read("99.tar", 0, 6) == b"longer"
    (tmp_path / "99.tar").unlink()
    assert store.read("99.tar", 0, 6) == b"longer"
    store.close()
    assert len(os.listdir("/proc/self/fd")) <= before


# ---- http


def test_http_ranges(server: FileServer, opened: Callable[..., Store]) -> None:
    store = opened(f"{server.url}/data/")
    assert store.size(NAME) == len(BODY)
    assert store.size("other.tar") is None
    assert store.read(NAME) == BODY
    assert store.read(NAME, 5, 9) == BODY[5:9]
    assert store.read(NAME, 5, 5) == b""
    assert store.read(NAME, 10_000) == BODY[10_000:]
    requests = [(NAME, n, n + 7) for n in range(40)]
    assert store.read_many(requests) == [BODY[n : n + 7] for n in range(40)]


def test_credentials_and_queries_are_sent_but_never_shown(
    server: FileServer, opened: Callable[..., Store]
) -> None:
    server.files["/a b/x y.tar"] = b"spaces"
    store = opened(f"{server.url.replace('//', '//me:secret@')}/a%20b?token=secret")
    assert store.read("x y.tar") == b"spaces"
    server.faults = ["503"] * 9
    with pytest.raises(DataError) as caught:
        store.read("x y.tar")
    assert "secret" not in f"{caught.value} {store.url} {store.address('x')}"


def test_a_scan_reads_blocks(server: FileServer, opened: Callable[..., Store]) -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for n in range(20):
            member = tarfile.TarInfo(f"{n}.bin")
            member.size = 1000
            tar.addfile(member, io.BytesIO(bytes([n]) * 1000))
    server.files["/data/scan.tar"] = packed.getvalue()
    with opened(f"{server.url}/data").open("scan.tar") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == entry(packed.getvalue())[0]
        file.seek(0)
        server.faults = ["503", "cut"]
        with tarfile.open(fileobj=file) as tar:
            contents = [tar.extractfile(member) for member in tar]
            assert [content and content.read(1) for content in contents] == [bytes([n]) for n in range(20)]
    assert server.bodies() < 6


@pytest.mark.parametrize("fault", ["503", "429", "500", "cut", "stall", "stall-body"])
def test_what_passes_is_retried_and_logged(
    fault: str, server: FileServer, opened: Callable[..., Store], caplog: pytest.LogCaptureFixture
) -> None:
    store = opened(f"{server.url}/data")
    server.faults = [fault]
    assert store.read(NAME, 100, 900) == BODY[100:900]
    server.faults = [fault]
    assert store.read(NAME) == BODY
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 2
    assert all(
        record.name == "mhla_lightning.data.stores.retry" and "\n" not in record.getMessage()
        for record in warnings
    )


@pytest.mark.parametrize("fault", ["503", "cut", "stall", "stall-body"])
def test_a_lasting_failure_is_refused(fault: str, server: FileServer, opened: Callable[..., Store]) -> None:
    store = opened(f"{server.url}/data")
    server.faults = [fault] * 3
    began = time.monotonic()
    with refused(f"{server.url}/data/{NAME}", DataError) as caught:
        store.read(NAME, 100, 900)
    assert "`data.reading.remote.retries`" in one_sentence(caught.value)
    assert time.monotonic() - began < 4


@pytest.mark.parametrize("status", ["404", "403", "401", "400"])
def test_a_permanent_failure_is_not_retried(
    status: str, server: FileServer, opened: Callable[..., Store]
) -> None:
    store = opened(f"{server.url}/data")
    server.faults = [status]
    with refused(f"{server.url}/data/{NAME}", DataError) as caught:
        store.read(NAME, 0, 10)
    assert f"HTTP {status}" in one_sentence(caught.value)
    assert server.bodies() == 1


def test_refused_connections_and_unknown_hosts(opened: Callable[..., Store]) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with refused(f"{nobody}/x.tar", DataError):
            opened(nobody).read("x.tar", 0, 5)
    with refused("http://no-such-host.invalid/x.tar", DataError):
        opened("http://no-such-host.invalid", ONCE).size("x.tar")


def test_a_cut_file_and_a_vanishing_one(server: FileServer, opened: Callable[..., Store]) -> None:
    store = opened(f"{server.url}/data")
    with refused(store.address(NAME), DataError):
        store.read(NAME, 20_000, 20_001)
    with refused(store.address(NAME), DataError):
        store.read(NAME, 10_000, 11_000)
    with store.open(NAME) as file:
        del server.files[f"/data/{NAME}"]
        with refused(store.address(NAME), DataError):
            file.read(10)


def test_sizes_when_head_is_refused(server: FileServer, opened: Callable[..., Store]) -> None:
    store = opened(f"{server.url}/data")
    for refusal in ("405", "403", "501"):
        server.faults = [refusal]
        assert store.size(NAME) == len(BODY)
    server.faults = ["503"]
    assert store.size(NAME) == len(BODY)
    server.faults = ["403", "403"]
    with refused(store.address(NAME), DataError):
        store.size(NAME)


def test_a_server_without_ranges_is_not_misread(tmp_path: Path, opened: Callable[..., Store]) -> None:
    """Python's own http.server answers a range request with 200 and the whole file."""
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / NAME).write_bytes(BODY)
    (tmp_path / "served" / "index.json").write_bytes(b"{}")

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path / "served"))) as plain:
        thread = threading.Thread(target=plain.serve_forever, args=(0.02,))
        thread.start()
        store = opened(f"http://127.0.0.1:{plain.server_port}")
        assert store.read("index.json") == b"{}"
        assert store.size(NAME) == len(BODY)
        for start, stop in ((0, 512), (512, 1024)):
            with refused(store.address(NAME), NoRanges) as caught:
                store.read(NAME, start, stop)
            one_sentence(caught.value)
        assert cached(store, tmp_path / "cache").read(NAME, 512, 1024) == BODY[512:1024]
        plain.shutdown()
        thread.join()


def test_large_files_are_copied_in_blocks_or_whole(
    server: FileServer, opened: Callable[..., Store], tmp_path: Path
) -> None:
    large = bytes(1000) + os.urandom(2 * BLOCK)
    server.files["/data/large.tar"] = large
    store = opened(f"{server.url}/data", Remote(retries=2, timeout=5.0, backoff=0.01))
    assert store.read("large.tar", 10, len(large)) == large[10:]
    ranged = cached(store, tmp_path / "ranged", 10**8, bodies={"large.tar": large})
    server.faults = ["503", "cut"]
    assert ranged.read("large.tar", 0, 5) == large[:5]
    server.ranges = False
    whole = cached(store, tmp_path / "whole", 10**8, bodies={"large.tar": large})
    server.faults = ["", "", "", "cut"]  # three ranges find out, then the whole file is begun twice
    assert whole.read("large.tar", len(large) - 5) == large[-5:]


# ---- processes


@pytest.mark.filterwarnings(FORKS)
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_workers_read_after_the_parent_did(
    method: str, server: FileServer, opened: Callable[..., Store]
) -> None:
    store = opened(f"{server.url}/data", Remote(retries=0, timeout=5.0))
    assert store.read(NAME, 0, 5) == BODY[:5]
    for _ in range(2):
        with ProcessPoolExecutor(2, multiprocessing.get_context(method)) as pool:
            reads = [pool.submit(store.read, NAME, n, n + 50) for n in range(6)]
            assert store.read_many([(NAME, n, n + 9) for n in range(16)]) == [
                BODY[n : n + 9] for n in range(16)
            ]
            assert [read.result(20) for read in reads] == [BODY[n : n + 50] for n in range(6)]
    assert store.read(NAME, 7, 9) == BODY[7:9]


def test_a_forked_child_that_drops_the_store_leaves_the_parent_alone(server: FileServer) -> None:
    """Closing inherited sockets in a child would take them out of the parent's epoll set: the parent's
    next answer would never arrive.
    """
    store = open_store(f"{server.url}/data", ONCE)
    assert store.read(NAME, 0, 5) == BODY[:5]
    child = os.fork()
    if child == 0:
        store.close()
        del store
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    for n in range(5):
        assert store.read(NAME, n, n + 5) == BODY[n : n + 5]
    store.close()


def test_closing_ends_the_thread_and_pickling_leaves_it_behind(
    server: FileServer, opened: Callable[..., Store], tmp_path: Path
) -> None:
    store = cached(opened(f"{server.url}/data"), tmp_path)
    threads = threading.active_count()
    assert store.read(NAME, 0, 5) == BODY[:5]
    copy = pickle.loads(pickle.dumps(store))
    assert copy.read(NAME, 5, 9) == BODY[5:9]
    assert copy.address(NAME) == store.address(NAME) == f"{server.url}/data/{NAME}"
    copy.close()
    store.close()
    time.sleep(0.1)
    assert not [thread for thread in threading.enumerate() if thread.name == "mhla-store-io"], threads
    assert store.size("x.tar") is None  # and it opens again
