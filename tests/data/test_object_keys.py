"""Keys of s3 and gs that a url would quote: they are taken as they are, by every reader."""

import json
from itertools import islice
from pathlib import Path
from urllib.parse import quote

import pytest

from mhla_lightning.cli.main import main
from mhla_lightning.data import ImageDataModule
from mhla_lightning.data.corpus import DataSource
from mhla_lightning.data.index import read_index
from mhla_lightning.data.prepare.places import find_splits
from mhla_lightning.data.stores import Remote, open_store
from mhla_lightning.data.stores.addresses import parse
from mhla_lightning.errors import DataError
from tests.helpers.data_modules import build
from tests.helpers.errors import refused
from tests.helpers.loopback import FORKS, FileServer, S3Bucket

pytestmark = [pytest.mark.timeout(120), pytest.mark.filterwarnings(FORKS)]
KEYS = [
    "my data",
    "100%",
    "my%20data",
    "a+b",
    "a#1",
    "a?b=c",
    "a::b",
    "é 日本/x",
    "a b/#?%25+&=,;@:",
    "a\u00a0b",
]


@pytest.mark.parametrize("protocol", ["s3", "gs", "S3"])
@pytest.mark.parametrize("key", KEYS)
def test_keys_are_plain(protocol: str, key: str) -> None:
    address = parse(f"{protocol}://bucket/{key}/")
    assert address.key("train/index.json") == f"bucket/{key}/train/index.json"
    assert address.shown("x") == f"{protocol.lower()}://bucket/{key}/x"
    again = parse(address.shown())
    assert again.key("x") == f"bucket/{key}/x"


@pytest.mark.parametrize(
    "url",
    [
        "s3://bucket?x=1/a",
        "s3://buc ket/a",
        "s3://key:secret@bucket/x y",
        "s3://key:sec/ret@bucket/x",
        "gs://bucket/a b/../c",
        "s3://bucket/a?versionId=3",
        "s3:// /x",
    ],
)
def test_addresses_that_name_no_folder(url: str) -> None:
    with pytest.raises(Exception, match="form|climbs|version") as error:
        open_store(url)
    assert "secret" not in str(error.value)
    assert "sec/" not in str(error.value)


def test_urls_remain_urls(server: FileServer, tmp_path: Path) -> None:
    """Of http and file, the advice that the refusal gives is what works."""
    server.files = {
        "/my data/index.json": b"abc",
        "/a#b/index.json": b"de",
    }
    for url, fact in {
        f"{server.url}/my data": "%20",
        f"{server.url}/a#b": "%23",
        "file:///my data": "%20",
        "file:///a#b": "%23",
        "file:///a?b": "%3F",
    }.items():
        with refused(url.split("?")[0]) as error:
            open_store(url)
        assert fact in error.value.reason
    assert open_store(f"{server.url}/my%20data", Remote(retries=0)).size("index.json") == 3
    assert open_store(f"{server.url}/a%23b", Remote(retries=0)).size("index.json") == 2
    for name in ("my data", "a#b", "a?b", "100%", "a%20b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_bytes(name.encode())
        for url in (str(tmp_path / name), f"file://{quote(str(tmp_path / name))}"):
            assert open_store(url).read("x") == name.encode()


@pytest.mark.slow
def test_training_verify_and_cache_read_a_folder_whose_name_needs_quoting(
    bucket: S3Bucket,
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The batches are those of the local folder, directly, from a cache and in a mixture."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", bucket.endpoint)
    local = build(ImageDataModule, path=str(shards), batch_size=16, image_size=8, num_workers=0)
    local.check(1)
    wanted = [batch["key"] for batch in islice(local.train_dataloader(), 4)]
    for number, key in enumerate(("my data", "50% #1?+é")):
        folder = tmp_path / key
        folder.symlink_to(shards)
        address = bucket.upload(folder)
        assert address == f"s3://bucket/{key}"
        assert read_index(f"{address}/train").hash == read_index(shards / "train").hash
        assert set(find_splits(address)) >= {"train", "val"}
        for cache in (None, str(tmp_path / f"cache{number}")):
            remote = Remote(timeout=10.0, cache_dir=cache)
            module = build(
                ImageDataModule, path=address, remote=remote, batch_size=16, image_size=8, num_workers=0
            )
            module.check(1)
            assert module.data_hash == local.data_hash
            assert [batch["key"] for batch in islice(module.train_dataloader(), 4)] == wanted
    assert (
        main(["data", "verify", "s3://bucket/my data", "--workers", "1", "--json", str(tmp_path / "j")]) == 0
    )
    assert json.loads((tmp_path / "j").read_text())
    capsys.readouterr()
    assert main(["data", "verify", "s3://bucket/my%20data", "--workers", "1"]) == 2
    assert "write 's3://bucket/my data'" in capsys.readouterr().err
    with refused("s3://bucket/my%20data/train/index.json", DataError) as error:
        read_index("s3://bucket/my%20data/train")
    assert "'s3://bucket/my data/train'" in error.value.reason
    assert DataSource("s3://bucket/50% #1?+é/").label == "50% #1?+é"
