"""Large shards are read in parts until they have come into the cache in the background."""

from __future__ import annotations

import hashlib
import pickle
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mhla_lightning.data.stores import CachedStore, LocalStore
from mhla_lightning.data.stores import cache as cache_module
from mhla_lightning.data.stores.base import Sink
from mhla_lightning.data.stores.retry import NoRanges
from mhla_lightning.errors import DataError

BYTES = bytes(range(256)) * 400


class Source(LocalStore):
    """A folder that notes what is asked of it, and can be slow or without ranges."""

    ranges, pause = True, 0.0

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.reads = 0

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        self.reads += 1
        if not self.ranges:
            raise NoRanges(name, "whole files only")
        return super().read(name, start, stop)

    def copy(self, name: str, size: int, sink: Sink) -> None:
        time.sleep(self.pause)
        sink.write(super().read(name, 0, size))


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    monkeypatch.setattr(cache_module, "WAIT_BYTES", 1000)
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "a.tar").write_bytes(BYTES)
    return Source(folder)


def cached(
    source: Source, tmp_path: Path, sha256: str = hashlib.sha256(BYTES).hexdigest(), limit: int = 10**6
) -> CachedStore:
    return CachedStore(source, {"a.tar": (sha256, len(BYTES))}, tmp_path / "cache", limit)


def wait_until(fact: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not fact():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def test_reading_does_not_wait_for_the_download(source: Source, tmp_path: Path) -> None:
    Source.pause = 1.0
    try:
        store = cached(source, tmp_path)
        began = time.monotonic()
        assert store.read("a.tar", 5, 10) == BYTES[5:10]
        assert store.read_many([("a.tar", 0, 3), ("a.tar", 7, 9)]) == [BYTES[:3], BYTES[7:9]]
        assert time.monotonic() - began < 0.9
        wait_until(lambda: len(list((tmp_path / "cache").glob("*.tar"))) == 1)
        before = source.reads
        assert store.read("a.tar", 100, 200) == BYTES[100:200]
        assert source.reads == before, "from the cache now"
    finally:
        Source.pause = 0.0


def test_a_server_without_ranges_is_waited_for(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Source, "ranges", False)
    monkeypatch.setattr(Source, "pause", 0.2)
    store = cached(source, tmp_path)
    assert store.read("a.tar", 5, 10) == BYTES[5:10]
    assert cached(source, tmp_path).read_many([("a.tar", 0, 3), ("a.tar", 7, 9)]) == [BYTES[:3], BYTES[7:9]]


def test_wrong_bytes_are_told_by_a_later_read(source: Source, tmp_path: Path) -> None:
    store = cached(source, tmp_path, sha256="0" * 64)

    def is_refused() -> bool:
        try:
            return store.read("a.tar", 5, 10) != BYTES[5:10]
        except DataError as error:
            return error.key == source.address("a.tar")

    wait_until(is_refused)
    assert not list((tmp_path / "cache").glob("*.tar"))


def test_a_shard_without_room_is_read_directly(source: Source, tmp_path: Path) -> None:
    store = cached(source, tmp_path, limit=10_000)
    assert store.read("a.tar", 5, 10) == BYTES[5:10]
    assert not list(tmp_path.glob("cache/*.tar"))


def test_a_copy_for_a_worker_fetches_by_itself(source: Source, tmp_path: Path) -> None:
    store = cached(source, tmp_path)
    store.read("a.tar", 0, 1)
    other = pickle.loads(pickle.dumps(store))
    assert other.read("a.tar", 5, 10) == BYTES[5:10]
    wait_until(lambda: len(list((tmp_path / "cache").glob("*.tar"))) == 1)
    assert other.read("a.tar", 5, 10) == BYTES[5:10]
