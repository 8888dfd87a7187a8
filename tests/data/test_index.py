"""The index, its hash, and every sentence about a split that is not whole."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mhla_lightning.data.check import Verify, check_split
from mhla_lightning.data.index import ShardEntry, ShardIndex, read_index, write_index
from mhla_lightning.data.prepare.pack import PackOptions, pack
from mhla_lightning.data.split import Split
from mhla_lightning.data.stores import LocalStore
from mhla_lightning.errors import DataError
from tests.helpers.errors import refused


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    for number in range(24):
        path = folder / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(path)
    target = tmp_path_factory.mktemp("packed") / "data"
    pack(folder, target, PackOptions(val=4, shards=4))
    return target


@pytest.fixture
def split(packed: Path, tmp_path: Path) -> Path:
    """A copy of a packed training split of 20 samples in 4 shards, to be damaged."""
    shutil.copytree(packed / "train", tmp_path / "train")
    return tmp_path / "train"


def _check(split: Path, verify: Verify = "auto") -> ShardIndex:
    """Check a split folder as training does."""
    opened = Split(read_index(split), LocalStore(split))
    check_split(opened, verify)
    return opened.index


def test_round_trip(tmp_path: Path) -> None:
    index = ShardIndex(
        "images",
        (ShardEntry("a.tar", 3, 10240, "0" * 64), ShardEntry("b.tar", 2, 10240, "f" * 64)),
        ("cat", "dög"),
    )
    write_index(tmp_path, index)
    assert read_index(tmp_path) == index
    assert index.hash == hashlib.sha256(f"a.tar {'0' * 64} 3\nb.tar {'f' * 64} 2\n".encode()).hexdigest()
    assert (index.samples, index.first_index(0), index.first_index(1)) == (5, 0, 3)


def test_index_file_has_the_documented_keys(packed: Path) -> None:
    content = json.loads((packed / "train" / "index.json").read_text())
    assert list(content) == [
        "format",
        "kind",
        "samples",
        "shards",
        "classes",
        "tokenizer",
        "vae",
        "length",
        "hash",
    ]
    assert content["format"] == 1
    assert list(content["shards"][0]) == ["name", "samples", "bytes", "sha256"]


def test_whole_split_passes(split: Path) -> None:
    index = _check(split)
    assert (index.samples, len(index.shards), index.classes) == (20, 4, ("a", "b"))


def _edit(split: Path, change: Callable) -> None:
    content = json.loads((split / "index.json").read_text())
    change(content)
    (split / "index.json").write_text(json.dumps(content))


INDEX_EDITS = {
    "another format": lambda c: c.update(format=2),
    "no format": lambda c: c.pop("format"),
    "another kind": lambda c: c.update(kind="sounds"),
    "no shards": lambda c: c.pop("shards"),
    "wrong type": lambda c: c.update(shards=[3]),
    "samples": lambda c: c.update(samples=21),
    "hash": lambda c: c.update(hash="0"),
    "pipe": lambda c: c["shards"][0].update(name="pipe:touch x.tar"),
    "path": lambda c: c["shards"][0].update(name="../x.tar"),
    "twice": lambda c: c["shards"].append(c["shards"][0]),
}


@pytest.mark.parametrize("change", INDEX_EDITS.values(), ids=INDEX_EDITS)
def test_a_bad_index_is_refused(split: Path, change: Callable) -> None:
    _edit(split, change)
    with refused(str(split / "index.json"), DataError) as error:
        read_index(split)
    assert "\n" not in str(error.value)


def _truncate(path: Path, count: int) -> None:
    path.write_bytes(path.read_bytes()[:count])


def _flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(bytes(data))


def _write_offsets(path: Path, offsets: list[int]) -> None:
    np.save(path, np.array(offsets, dtype=np.int64), allow_pickle=False)


SHARD, OFFSETS = "train-000001.tar", "train-000001.tar.offsets.npy"
DAMAGES = {
    "no index": (lambda s: (s / "index.json").unlink(), "auto", "index.json"),
    "no JSON": (lambda s: (s / "index.json").write_text("{"), "auto", "index.json"),
    "a JSON list": (lambda s: (s / "index.json").write_text("[]"), "auto", "index.json"),
    "no samples": (lambda s: write_index(s, ShardIndex("images", (), ("a",))), "auto", "index.json"),
    "missing shard": (lambda s: (s / SHARD).unlink(), "size", SHARD),
    "cut shard": (lambda s: _truncate(s / SHARD, 4096), "size", SHARD),
    "short offsets": (lambda s: _write_offsets(s / OFFSETS, [0, 512]), "size", OFFSETS),
    "pickled offsets": (lambda s: np.save(s / OFFSETS, np.array([{}]), allow_pickle=True), "size", OFFSETS),
    "falling offsets": (lambda s: _write_offsets(s / OFFSETS, [0, 4, 3, 5, 6, 7]), "size", OFFSETS),
    "shifted offsets": (
        lambda s: _write_offsets(s / OFFSETS, [512, 600, 700, 800, 900, 1000]),
        "size",
        SHARD,
    ),
    "flipped byte": (lambda s: _flip(s / SHARD, 600), "auto", SHARD),
}


@pytest.mark.parametrize(("damage", "verify", "file"), DAMAGES.values(), ids=DAMAGES)
def test_damage_is_refused(split: Path, damage: Callable, verify: Verify, file: str) -> None:
    damage(split)
    with refused(str(split / file), DataError) as error:
        _check(split, verify)
    assert "\n" not in str(error.value)


def test_verify_decides_what_is_read(split: Path) -> None:
    _flip(split / SHARD, 600)
    _check(split, "size")
    (split / SHARD).unlink()
    _check(split, "none")
    with refused("verify"):
        _check(split, "szie")  # type: ignore[arg-type]


def test_missing_offsets_of_images_are_found_by_a_scan(split: Path) -> None:
    stored = Split(read_index(split), LocalStore(split)).offsets(1)
    (split / OFFSETS).unlink()
    assert Split(_check(split), LocalStore(split)).offsets(1).tolist() == stored.tolist()


def test_offsets_point_at_headers(split: Path) -> None:
    index = read_index(split)
    opened = Split(index, LocalStore(split))
    for number, entry in enumerate(index.shards):
        data, offsets = (split / entry.name).read_bytes(), opened.offsets(number)
        assert all(data[offset + 257 : offset + 262] == b"ustar" for offset in offsets[:-1])
        assert not any(data[offsets[-1] :])
        assert data[offsets[-1] - 512 : offsets[-1]].strip(b"\0")
