"""The store of s3:// against moto's server, and against one that misbehaves."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from mhla_lightning.data.stores import Remote, Store
from mhla_lightning.data.stores.retry import Failure
from mhla_lightning.errors import DataError
from tests.helpers.errors import refused
from tests.helpers.loopback import BODY, FORKS, NAME, FileServer, S3Bucket, cached, one_sentence


def test_s3(
    bucket: S3Bucket, opened: Callable[..., Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", bucket.endpoint)
    for remote in (Remote(timeout=10.0, endpoint=bucket.endpoint), Remote(timeout=10.0)):
        store = opened("s3://bucket/data", remote)
        assert store.size(NAME) == len(BODY)
        assert store.size("missing.tar") is None
        assert opened("s3://bucket", remote).size("data") is None  # a prefix of other keys is no file
        assert store.read(NAME) == BODY
        assert store.read(NAME, 10_000) == BODY[10_000:]
        assert store.read_many([(NAME, n, n + 3) for n in range(9)]) == [BODY[n : n + 3] for n in range(9)]
        with store.open(NAME) as file:
            assert file.read() == BODY
    assert cached(store, tmp_path).read(NAME, 5, 9) == BODY[5:9]
    for name in ("missing.tar", NAME):
        with refused(f"s3://bucket/data/{name}", DataError) as caught:
            store.read(name, 50_000, 50_001)
        one_sentence(caught.value)
    with refused(f"s3://other/data/{NAME}", DataError):
        opened("s3://other/data", remote).read(NAME, 0, 1)


@pytest.mark.filterwarnings(FORKS)
@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_s3_workers_read_after_the_parent_did(
    method: str, bucket: S3Bucket, opened: Callable[..., Store]
) -> None:
    store = opened("s3://bucket/data", Remote(timeout=10.0, retries=0, endpoint=bucket.endpoint))
    assert store.read(NAME, 0, 5) == BODY[:5]
    with ProcessPoolExecutor(1, multiprocessing.get_context(method)) as pool:
        assert pool.submit(store.read, NAME, 5, 9).result(30) == BODY[5:9]
    assert store.read(NAME, 7, 9) == BODY[7:9]


@pytest.mark.parametrize(
    ("fault", "permanent"), [("503", False), ("cut", False), ("stall-body", False), ("403", True)]
)
def test_s3_faults(
    fault: str, permanent: bool, server: FileServer, s3_env: None, opened: Callable[..., Store]
) -> None:
    """One try of ours is one request: neither s3fs nor botocore multiplies them."""
    server.files[f"/bucket/{NAME}"] = BODY
    store = opened("s3://bucket", Remote(retries=1, timeout=2.0, backoff=0.01, endpoint=server.url))
    assert store.read(NAME, 0, 9) == BODY[:9]
    server.log.clear()
    if fault in ("503", "cut"):
        server.faults = [fault]
        assert store.read(NAME, 100, 900) == BODY[100:900]
        assert server.bodies() == 2
    server.faults = [fault] * 2
    with refused(f"s3://bucket/{NAME}", DataError) as caught:
        store.read(NAME, 100, 900)
    assert isinstance(caught.value.__cause__, Failure)
    assert caught.value.__cause__.permanent == permanent
    one_sentence(caught.value)
    assert server.bodies() == {"403": 1, "stall-body": 2}.get(fault, 4)


def test_s3_without_credentials_or_server(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, opened: Callable[..., Store]
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    nowhere = "http://127.0.0.1:1"
    with refused(f"s3://bucket/{NAME}", DataError):
        opened("s3://bucket", Remote(timeout=5.0, endpoint=nowhere)).size(NAME)
    with refused(f"s3://bucket/{NAME}", DataError):
        opened(
            "s3://bucket", Remote(retries=1, backoff=0.01, timeout=5.0, endpoint=nowhere, anonymous=True)
        ).size(NAME)
