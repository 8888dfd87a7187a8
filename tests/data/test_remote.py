"""One training sequence, wherever its shards lie and whatever goes wrong on the way: http, s3, a cache and
a mixture give it bit for bit.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from mhla_lightning.cli.main import main
from mhla_lightning.data import Augmentation, ImageDataModule
from mhla_lightning.data.corpus import DataSource
from mhla_lightning.data.stores import Remote
from mhla_lightning.data.stream import Batch
from mhla_lightning.errors import DataError
from tests.helpers.damaged import BAD, SHARDS, DataSet, assert_error, refusal
from tests.helpers.data_modules import build
from tests.helpers.loopback import FORKS, FileServer, S3Bucket

pytestmark = [pytest.mark.timeout(60), pytest.mark.filterwarnings(FORKS)]
PATIENT: dict[str, Any] = {"retries": 8, "timeout": 0.6, "backoff": 0.01}
FAST = Remote(retries=2, timeout=0.5, backoff=0.01)
EPOCHS, PER_EPOCH = 2, 4  # batches of 16 from the 64 images of `shards`
# One request in four goes wrong, in every way that may pass; the slow ones, which wait for the time-out, once
# each.
QUICK = ["", "", "", "503", "", "", "", "cut", "", "", "", "reset", "", "", "", "429"]
FAULTS = [*QUICK, "", "", "", "stall", "", "", "", "stall-body", *QUICK * 12]


def _module(path: str | None, remote: Remote | None = None, **options: Any) -> ImageDataModule:
    """Augmented with random numbers, so that images are equal only where these are."""
    augmentation = Augmentation(scale=(0.5, 1.0), auto_augment=None)
    common: dict[str, Any] = {"batch_size": 16, "image_size": 8, "num_workers": 2, "lanes": 4, "window": 8}
    return build(ImageDataModule, path=path, remote=remote, augmentation=augmentation, **(common | options))


def _sequence(module: ImageDataModule) -> list[Batch]:
    """Two epochs of training and one validation, after the check that `mhla run` makes."""
    module.check(1)
    try:
        return [*islice(module.train_dataloader(), EPOCHS * PER_EPOCH), *module.val_dataloader()]
    finally:
        module.teardown("fit")


def _assert_equal(found: list[Batch], wanted: list[Batch]) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one["key"] == other["key"]
        for name in ("index", "epoch", "source", "image", "label", "weight", "skipped"):
            assert torch.equal(one[name], other[name]), name


@pytest.fixture(scope="module")
def local(shards: Path) -> list[Batch]:
    batches = _sequence(_module(str(shards)))
    keys = [key for batch in batches[:PER_EPOCH] for key in batch["key"]]
    assert len(keys) == len(set(keys)) == 64
    assert not torch.equal(batches[0]["image"], batches[PER_EPOCH]["image"])
    return batches


@pytest.fixture
def remote_url(server: FileServer, shards: Path) -> str:
    return server.serve_folder(shards)


@pytest.mark.parametrize("cache", ["direct", "cached"])
@pytest.mark.parametrize("faults", [[], FAULTS], ids=["well", "with faults"])
def test_http(
    remote_url: str, server: FileServer, local: list[Batch], tmp_path: Path, faults: list[str], cache: str
) -> None:
    server.faults = list(faults)
    folder = str(tmp_path / "cache") if cache == "cached" else None
    _assert_equal(_sequence(_module(remote_url, Remote(cache_dir=folder, **PATIENT))), local)
    assert len(server.log) > 30
    if faults:
        assert len(faults) - len(server.faults) > 24, "every fault happened"
    if cache == "cached":
        assert len(list(tmp_path.glob("cache/*.tar"))) == 12


def test_http_without_ranges(remote_url: str, server: FileServer, local: list[Batch], tmp_path: Path) -> None:
    server.ranges = False
    with pytest.raises(DataError) as error:
        _sequence(_module(remote_url, Remote(**PATIENT)))
    assert str(error.value.key).startswith(remote_url)
    server.faults = list(FAULTS)
    _assert_equal(_sequence(_module(remote_url, Remote(cache_dir=str(tmp_path), **PATIENT))), local)


def test_wrong_bytes_do_not_pass_the_cache(
    remote_url: str, server: FileServer, local: list[Batch], tmp_path: Path
) -> None:
    """Answers of the right length, and twice of other bytes: what arrives is compared with the index
    before anybody reads it.
    """
    tars = [path for path in server.files if path.endswith(".tar") and path.startswith("/shards/")]
    server.faults_of = {path: ["wrong", "wrong"] for path in tars[::2]}
    _assert_equal(_sequence(_module(remote_url, Remote(cache_dir=str(tmp_path), **PATIENT))), local)
    assert not any(server.faults_of.values())


@pytest.mark.parametrize("cache", ["direct", "cached"])
def test_s3(bucket: S3Bucket, shards: Path, local: list[Batch], tmp_path: Path, cache: str) -> None:
    folder = str(tmp_path) if cache == "cached" else None
    remote = Remote(endpoint=bucket.endpoint, timeout=10.0, cache_dir=folder)
    _assert_equal(_sequence(_module(bucket.upload(shards), remote)), local)
    assert len(list(tmp_path.glob("*.tar"))) == (12 if folder else 0)


@pytest.mark.slow
def test_s3_with_faults(server: FileServer, s3_env: None, shards: Path, local: list[Batch]) -> None:
    """The FileServer speaks enough of S3 for reading: GET and HEAD of /BUCKET/KEY."""
    server.serve_folder(shards)
    server.files |= {f"/bucket{path}": data for path, data in server.files.items()}
    server.faults = list(FAULTS)
    _assert_equal(
        _sequence(_module("s3://bucket/shards", Remote(endpoint=server.url, **(PATIENT | {"timeout": 2.0})))),
        local,
    )
    assert len(server.log) > 2 * len(QUICK)


@pytest.mark.slow
def test_a_mixture_of_local_and_remote(
    remote_url: str, server: FileServer, bucket: S3Bucket, shards: Path
) -> None:
    def mix(*paths: str) -> list[DataSource]:
        return [
            DataSource(path, weight, name=f"{weight}")
            for path, weight in zip(paths, (3.0, 2.0, 1.0), strict=True)
        ]

    remote = Remote(endpoint=bucket.endpoint, **(PATIENT | {"timeout": 5.0}))
    wanted = _sequence(_module(None, mix=mix(*[str(shards)] * 3)))
    server.faults = ["", "503", "", "cut", "reset"]
    _assert_equal(
        _sequence(_module(None, remote, mix=mix(str(shards), remote_url, bucket.upload(shards)))), wanted
    )
    assert {int(source) for batch in wanted for source in batch["source"]} == {0, 1, 2}


@pytest.mark.slow  # test_http: the same bytes in the same order
def test_mhla_run_over_http_has_the_same_losses(
    recipe: Path, remote_url: str, server: FileServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(recipe), "--run-id", "local"]) == 0
    server.faults = list(FAULTS)
    options = [part for name, value in PATIENT.items() for part in (f"--data.remote.{name}", str(value))]
    assert (
        main(
            [
                "run",
                str(recipe),
                "--run-id",
                "http",
                "--data.path",
                remote_url,
                "--data.num_workers",
                "2",
                *options,
            ]
        )
        == 0
    )
    assert len(server.log) > 2 * len(QUICK)
    assert _losses(tmp_path / "runs" / "http") == _losses(tmp_path / "runs" / "local")
    assert len(_losses(tmp_path / "runs" / "local")) > 12
    capsys.readouterr()


def _losses(run: Path) -> list[tuple[int, str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        (line["step"], line["tag"], line["value"])
        for line in lines
        if line["tag"] in ("train/loss", "val/loss")
    ]


# Servers that do not recover


@pytest.fixture
def served(server: FileServer, tmp_path: Path) -> tuple[DataSet, str]:
    data = DataSet(tmp_path / "images", "images")
    return data, server.serve_folder(data.root)


SHARD = "/images/train/001.tar"


def _set(server: FileServer, path: str, change: Callable[[bytes], bytes]) -> None:
    server.files[path] = change(server.files[path])


BROKEN: dict[str, tuple[Callable[[FileServer], object], str, str]] = {
    "no index": (
        lambda s: s.files.pop("/images/train/index.json"),
        "check",
        "train/index.json",
    ),
    "index always 500": (
        lambda s: s.faults.extend(["500"] * 99),
        "check",
        "train/index.json",
    ),
    "index always 404": (lambda s: s.faults.extend(["404"] * 99), "check", "train/index.json"),
    "index forbidden": (
        lambda s: s.faults.extend(["403"] * 99),
        "check",
        "train/index.json",
    ),
    "index stalls": (
        lambda s: s.faults.extend(["stall"] * 99),
        "check",
        "train/index.json",
    ),
    "index cut": (lambda s: s.faults.extend(["", "cut", "cut", "cut"]), "check", "train/index.json"),
    "index reset": (
        lambda s: s.faults.extend(["reset"] * 99),
        "check",
        "train/index.json",
    ),
    "index of other bytes": (
        lambda s: s.faults.extend(["", "wrong"]),
        "check",
        "train/index.json",
    ),
    "index is a page": (
        lambda s: _set(s, "/images/train/index.json", lambda _: b"<html>log in</html>"),
        "check",
        "train/index.json",
    ),
    "no shard": (
        lambda s: s.files.pop(SHARD),
        "read",
        "train/001.tar",
    ),
    "shard cut": (
        lambda s: _set(s, SHARD, lambda data: data[:5000]),
        "read",
        "train/001.tar",
    ),
    "shard of other bytes": (
        lambda s: _set(s, SHARD, lambda data: bytes(255 - b for b in data)),
        "read",
        "train/001.tar",
    ),
    "offsets of other bytes": (
        lambda s: _set(s, SHARD + ".offsets.npy", lambda data: data[::-1]),
        "read",
        "train/001.tar.offsets.npy",
    ),
    "no offsets, shard cut": (
        lambda s: [s.files.pop(SHARD + ".offsets.npy"), s.files.update({SHARD: s.files[SHARD][: 3 * 2048]})],
        "read",
        "train/001.tar",
    ),
}


@pytest.mark.parametrize(("change", "layer", "file"), BROKEN.values(), ids=BROKEN)
def test_a_broken_server_is_refused(
    served: tuple[DataSet, str],
    server: FileServer,
    change: Callable[[FileServer], object],
    layer: str,
    file: str,
) -> None:
    data, url = served
    change(server)
    assert_error(refusal(data.module(path=url, remote=FAST)), layer, f"{url}/{file}")


@pytest.mark.parametrize("end", ["stops", "hangs", "loses a shard"])
def test_a_server_that_vanishes_while_training_reads(
    served: tuple[DataSet, str], server: FileServer, end: str
) -> None:
    data, url = served
    module = data.module(path=url, remote=FAST)
    module.check(1)
    batches = iter(module.train_dataloader())
    try:
        assert len(list(islice(batches, SHARDS))) == SHARDS
        began = time.monotonic()
        if end == "loses a shard":
            del server.files[SHARD]
        else:
            server.faults = ["reset" if end == "stops" else "stall"] * 9999
        with pytest.raises(DataError) as error:
            list(islice(batches, 99))
        assert str(error.value.key).startswith(f"{url}/train/")
        if end == "loses a shard":
            assert str(error.value.key).endswith("001.tar")
        assert str(error.value).isprintable()
        assert time.monotonic() - began < 10
    finally:
        module.teardown("fit")


# The cache


def test_a_server_without_an_end_does_not_fill_the_disk(
    served: tuple[DataSet, str], server: FileServer, tmp_path: Path
) -> None:
    data, url = served
    server.ranges = False
    module = data.module(
        path=url,
        remote=Remote(retries=1, timeout=2.0, backoff=0.01, cache_dir=str(tmp_path / "cache")),
        num_workers=0,
    )
    module.check(1)
    for name in ("000.tar", "001.tar", "002.tar", "003.tar"):
        served_as = server.files[f"/images/train/{name}"]
        server.files[f"/images/train/{name}"] = served_as + bytes(
            2**25
        )  # a download of more than the index says
    with pytest.raises(DataError) as error:
        list(islice(module.train_dataloader(), 4))
    assert str(error.value.key).startswith(f"{url}/train/")
    assert sum(path.stat().st_size for path in (tmp_path / "cache").iterdir()) < 10**5


@pytest.mark.parametrize("what", ["full disk", "a file in its place", "too small", "no right to write"])
def test_a_cache_that_cannot_be_used_changes_nothing(
    remote_url: str, local: list[Batch], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    folder, size = tmp_path / "cache", "1GB"
    if what == "full disk":
        monkeypatch.setattr("mhla_lightning.data.stores.cache.os.write", _full)
    elif what == "a file in its place":
        folder.write_text("not a folder")
    elif what == "too small":
        size = "100"
    elif os.geteuid() == 0:
        folder = Path("/proc/mhla-cache")  # where not even root may write
    else:
        folder.mkdir(mode=0o500)
    _assert_equal(
        _sequence(_module(remote_url, Remote(cache_dir=str(folder), cache_bytes=size, **PATIENT))), local
    )


def _full(descriptor: int, data: bytes) -> int:
    raise OSError(28, "No space left on device")


def test_a_cache_smaller_than_the_data_changes_nothing(
    remote_url: str, local: list[Batch], shards: Path, tmp_path: Path
) -> None:
    bound = sum(path.stat().st_size for path in shards.glob("train/*.tar")) // 3
    _assert_equal(
        _sequence(_module(remote_url, Remote(cache_dir=str(tmp_path), cache_bytes=bound, **PATIENT))), local
    )
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= bound


@pytest.mark.parametrize(
    "damage", ["cut", *(pytest.param(damage, marks=pytest.mark.slow) for damage in ("emptied", "removed"))]
)
def test_a_damaged_cached_shard_is_fetched_again(
    remote_url: str, local: list[Batch], tmp_path: Path, damage: str
) -> None:
    remote = Remote(cache_dir=str(tmp_path), **PATIENT)
    _sequence(_module(remote_url, remote))
    for number, path in enumerate(sorted(tmp_path.glob("*.tar"))):
        if number % 2:
            path.unlink() if damage == "removed" else os.truncate(path, 1000 if damage == "cut" else 0)
    _assert_equal(_sequence(_module(remote_url, remote)), local)


def test_a_changed_cached_shard_is_told_or_counted(served: tuple[DataSet, str], tmp_path: Path) -> None:
    """Its size is right, so it is not fetched again: what cannot be decoded is counted, and a tar header
    that is none ends training.
    """
    data, url = served
    remote = Remote(cache_dir=str(tmp_path / "cache"), retries=2, timeout=2.0)
    options: dict[str, Any] = {"path": url, "remote": remote}
    assert len(list(islice(data.module(**options, num_workers=0).train_dataloader(), SHARDS))) == SHARDS
    sha256 = json.loads(data.index.read_text())["shards"][1]["sha256"]
    cached = tmp_path / "cache" / f"{sha256}.tar"
    whole = cached.read_bytes()
    start = whole.index(b"IDAT", (BAD - 8) * 2048)
    cached.write_bytes(whole[:start] + bytes(8) + whole[start + 8 :])
    batches = list(islice(data.module(**options, num_workers=0).train_dataloader(), SHARDS))
    assert sum(int(batch["skipped"]) for batch in batches) == 1
    assert {int(index) for batch in batches for index in batch["index"]} == set(range(32)) - {BAD}
    cached.write_bytes(bytes(len(whole)))
    assert_error(refusal(data.module(**options)), "read", f"{url}/train/001.tar")
