"""The cache of whole shards: shared, bounded, and never trusted before its bytes are compared."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pytest

from mhla_lightning.data.stores import LocalStore, Remote, Store, open_store, with_cache
from mhla_lightning.data.stores.cache_folder import CacheFolder
from mhla_lightning.errors import DataError
from tests.helpers.errors import refused
from tests.helpers.loopback import BODY, NAME, FileServer, cached, entry, one_sentence


def test_one_download_serves_all_processes(
    server: FileServer, opened: Callable[..., Store], tmp_path: Path
) -> None:
    store = cached(opened(f"{server.url}/data"), tmp_path)
    with ProcessPoolExecutor(3, multiprocessing.get_context("forkserver")) as pool:
        reads = [pool.submit(store.read, NAME, n, n + 50) for n in range(9)]
        assert [read.result(20) for read in reads] == [BODY[n : n + 50] for n in range(9)]
    assert store.read(NAME) == BODY
    assert server.bodies() == 1
    assert not list(tmp_path.glob("*.tmp"))


def test_threads_of_one_process_share_a_download(
    server: FileServer, opened: Callable[..., Store], tmp_path: Path
) -> None:
    store = cached(opened(f"{server.url}/data"), tmp_path)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda n: store.read(NAME, n, n + 5), range(32))) == [
            BODY[n : n + 5] for n in range(32)
        ]
    assert server.bodies() == 1


def test_a_file_stays_open_while_it_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / NAME).write_bytes(BODY)
    store = LocalStore(tmp_path)
    assert store.hold(NAME, len(BODY))
    plain_fstat = os.fstat

    def late(descriptor: int) -> os.stat_result:
        # what another thread may do between the look-up and the system call; one that opens the same file
        # lets go of ours, too
        store.close()
        return plain_fstat(descriptor)

    monkeypatch.setattr(os, "fstat", late)
    assert store.hold(NAME, len(BODY))
    assert store.read(NAME) == BODY


def test_a_killed_download_is_taken_over(
    server: FileServer, opened: Callable[..., Store], tmp_path: Path
) -> None:
    patient = opened(f"{server.url}/data", Remote(timeout=30.0))
    server.faults = ["stall-body"]
    process = multiprocessing.get_context("forkserver").Process(
        target=cached(patient, tmp_path).read, args=(NAME,)
    )
    process.start()
    while not list(tmp_path.glob("*.tmp")) or not server.log:
        time.sleep(0.02)
    impatient = cached(opened(f"{server.url}/data"), tmp_path, patience=0.3)
    assert impatient.read(NAME, 0, 5) == BODY[:5]  # directly: the other process shows no progress
    assert not list(tmp_path.glob("*.tar"))
    waiter = cached(opened(f"{server.url}/data"), tmp_path, patience=20)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(waiter.read, NAME)
        time.sleep(0.3)
        process.kill()
        assert waiting.result(5) == BODY
    process.join()
    assert [path.stat().st_size for path in tmp_path.glob("*.tar")] == [len(BODY)]
    assert not list(tmp_path.glob("*.tmp"))


def test_equal_names_do_not_collide_and_other_files_pass_through(
    server: FileServer, opened: Callable[..., Store], tmp_path: Path
) -> None:
    server.files |= {"/other/" + NAME: BODY[::-1], "/data/index.json": b"{}"}
    one = cached(opened(f"{server.url}/data"), tmp_path)
    other = cached(opened(f"{server.url}/other"), tmp_path, bodies={NAME: BODY[::-1]})
    assert (one.read(NAME), other.read(NAME)) == (BODY, BODY[::-1])
    assert one.read("index.json") == b"{}"
    assert one.size("index.json") == 2
    assert one.read_many([("index.json", 0, 1), (NAME, 3, 5)]) == [b"{", BODY[3:5]]
    with one.open(NAME) as file:
        assert file.name.startswith(str(tmp_path))
    assert len(list(tmp_path.glob("*.tar"))) == 2


def test_with_cache_also_for_local_folders(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(BODY)
    store, files = open_store(tmp_path), {NAME: entry(BODY)}
    assert with_cache(store, files, Remote()) is store
    behind = with_cache(store, files, Remote(cache_dir=str(tmp_path / "cache")))
    assert behind.read(NAME, 1, 4) == BODY[1:4]
    (tmp_path / NAME).unlink()
    assert (behind.read(NAME), behind.size(NAME)) == (BODY, None)
    with refused(str(tmp_path / NAME), DataError):
        with_cache(store, {NAME: ("../../x", 5)}, Remote(cache_dir=str(tmp_path)))


def test_wrong_bytes_are_fetched_again_then_refused(
    server: FileServer, opened: Callable[..., Store], tmp_path: Path
) -> None:
    store = cached(opened(f"{server.url}/data"), tmp_path)
    server.faults = ["wrong", "wrong"]
    assert store.read(NAME) == BODY
    server.faults = ["wrong"] * 3
    with refused(f"{server.url}/data/{NAME}", DataError) as caught:
        cached(opened(f"{server.url}/data"), tmp_path / "other").read(NAME)
    one_sentence(caught.value)
    assert not list((tmp_path / "other").glob("*.t*"))


def test_a_truncated_cached_file_is_fetched_again(
    server: FileServer, opened: Callable[..., Store], tmp_path: Path
) -> None:
    store = cached(opened(f"{server.url}/data"), tmp_path)
    assert store.read(NAME) == BODY
    os.truncate(next(tmp_path.glob("*.tar")), 100)
    assert store.read(NAME, 5000, 5010) == BODY[5000:5010]
    assert server.bodies() == 2


def test_eviction_keeps_the_bound_and_the_recent(tmp_path: Path) -> None:
    bodies = {f"{n}.tar": bytes([n]) * 1000 for n in range(6)}
    (tmp_path / "data").mkdir()
    for name, data in bodies.items():
        (tmp_path / "data" / name).write_bytes(data)
    cache = tmp_path / "cache"
    store = cached(LocalStore(tmp_path / "data"), cache, 3500, bodies=bodies)
    paths = {name: cache / f"{entry(data)[0]}.tar" for name, data in bodies.items()}
    for name, age in (("0.tar", 300), ("1.tar", 500), ("2.tar", 400)):
        assert store.read(name) == bodies[name]
        os.utime(paths[name], (time.time() - age, time.time() - age))
    assert store.read("3.tar") == bodies["3.tar"]
    assert sorted(name for name, path in paths.items() if path.exists()) == ["0.tar", "2.tar", "3.tar"]
    assert store.read("1.tar", 0, 5) == bodies["1.tar"][:5]  # removed, but open here
    other = cached(LocalStore(tmp_path / "data"), cache, 3500, bodies=bodies)
    assert other.read("0.tar") == bodies["0.tar"]  # used now, so 2.tar is the oldest
    assert other.read("4.tar") == bodies["4.tar"]
    assert sorted(name for name, path in paths.items() if path.exists()) == ["0.tar", "3.tar", "4.tar"]
    for name in bodies:  # everything was used just now: the bound holds all the same
        assert other.read(name) == bodies[name]
        assert sum(path.stat().st_size for path in cache.glob("*.t*")) <= 3500


def test_abandoned_files_are_removed(tmp_path: Path) -> None:
    folder = CacheFolder(tmp_path, 10**6, 1.0)
    gone, busy, old = (tmp_path / f"{letter * 64}.1.tmp" for letter in "abc")
    for path in (gone, busy, old):
        path.write_bytes(b"x")
    os.utime(old, (time.time() - 90_000, time.time() - 90_000))
    with folder.lock("b" * 64) as held, folder.lock("c" * 64), folder.lock("d" * 64):
        assert held
        assert folder.reserve("d" * 64, 10) is not None
        assert [path.exists() for path in (gone, busy, old)] == [False, True, False]


def test_a_shard_beyond_the_bound_is_read_directly(
    server: FileServer, opened: Callable[..., Store], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = cached(opened(f"{server.url}/data"), tmp_path, max_bytes=1000)
    assert [store.read(NAME, n, n + 5) for n in range(4)] == [BODY[n : n + 5] for n in range(4)]
    assert [record.getMessage().split(":")[-1] for record in caplog.records] == [" read directly"]


@pytest.mark.parametrize("what", ["full disk", "no folder"])
def test_a_cache_that_cannot_be_written_is_done_without(
    what: str,
    server: FileServer,
    opened: Callable[..., Store],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(descriptor: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    folder = tmp_path / "cache"
    if what == "full disk":
        monkeypatch.setattr("mhla_lightning.data.stores.cache.os.write", full)
    else:
        folder.write_text("a file where the folder should be")
    server.files["/data/b.tar"] = BODY[:500]
    store = cached(opened(f"{server.url}/data"), folder, bodies={NAME: BODY, "b.tar": BODY[:500]})
    assert [store.read(NAME, n, n + 5) for n in range(4)] == [BODY[n : n + 5] for n in range(4)]
    assert store.read("b.tar") == BODY[:500]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "nothing more is cached there" in caplog.text
    assert not list(tmp_path.glob("**/*.tmp"))
