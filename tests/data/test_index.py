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
from mhla_lightning.errors import DataError, UserError


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
    "another format": (lambda c: c.update(format=2), ["has format 2", "format 1"]),
    "no format": (lambda c: c.pop("format"), ["has format None"]),
    "another kind": (lambda c: c.update(kind="sounds"), ["'sounds'", "images, tokens"]),
    "no shards": (lambda c: c.pop("shards"), ["lacks the key 'shards'"]),
    "wrong type": (lambda c: c.update(shards=[3]), ["wrong type"]),
    "samples": (lambda c: c.update(samples=21), ["21 samples", "hold 20"]),
    "hash": (lambda c: c.update(hash="0"), ["says hash 0"]),
    "pipe": (
        lambda c: c["shards"][0].update(name="pipe:touch x.tar"),
        ["'pipe:touch x.tar'", "plain file name"],
    ),
    "path": (lambda c: c["shards"][0].update(name="../x.tar"), ["'../x.tar'", "plain file name"]),
    "twice": (lambda c: c["shards"].append(c["shards"][0]), ["lists a shard twice: train-000000.tar"]),
}


@pytest.mark.parametrize(("change", "facts"), INDEX_EDITS.values(), ids=INDEX_EDITS)
def test_bad_index_is_told_in_one_sentence(split: Path, change: Callable, facts: list[str]) -> None:
    _edit(split, change)
    with pytest.raises(DataError) as error:
        read_index(split)
    _assert_sentence(error, [str(split / "index.json"), *facts])


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
    "no index": (
        lambda s: (s / "index.json").unlink(),
        "auto",
        "index.json",
        ["does not exist", "mhla data index"],
    ),
    "no JSON": (
        lambda s: (s / "index.json").write_text("{"),
        "auto",
        "index.json",
        ["cannot be read as JSON"],
    ),
    "a JSON list": (lambda s: (s / "index.json").write_text("[]"), "auto", "index.json", ["list", "object"]),
    "no samples": (
        lambda s: write_index(s, ShardIndex("images", (), ("a",))),
        "auto",
        "index.json",
        ["no samples"],
    ),
    "missing shard": (lambda s: (s / SHARD).unlink(), "size", SHARD, ["is missing"]),
    "cut shard": (lambda s: _truncate(s / SHARD, 4096), "size", SHARD, ["4096 bytes", "says 20480"]),
    "short offsets": (
        lambda s: _write_offsets(s / OFFSETS, [0, 512]),
        "size",
        OFFSETS,
        ["int64 (2,)", "int64 (6,)"],
    ),
    "pickled offsets": (
        lambda s: np.save(s / OFFSETS, np.array([{}]), allow_pickle=True),
        "size",
        OFFSETS,
        ["unreadable"],
    ),
    "falling offsets": (
        lambda s: _write_offsets(s / OFFSETS, [0, 4, 3, 5, 6, 7]),
        "size",
        OFFSETS,
        ["does not grow"],
    ),
    "shifted offsets": (
        lambda s: _write_offsets(s / OFFSETS, [512, 600, 700, 800, 900, 1000]),
        "size",
        SHARD,
        ["no tar header at byte"],
    ),
    "flipped byte": (lambda s: _flip(s / SHARD, 600), "auto", SHARD, ["sha256", "its bytes changed"]),
}


@pytest.mark.parametrize(("damage", "verify", "file", "facts"), DAMAGES.values(), ids=DAMAGES)
def test_damage_is_told_in_one_sentence(
    split: Path, damage: Callable, verify: Verify, file: str, facts: list[str]
) -> None:
    damage(split)
    with pytest.raises(DataError) as error:
        _check(split, verify)
    _assert_sentence(error, [str(split / file), *facts])


def test_verify_decides_what_is_read(split: Path) -> None:
    _flip(split / SHARD, 600)
    _check(split, "size")
    (split / SHARD).unlink()
    _check(split, "none")
    with pytest.raises(UserError, match="unknown data.verify 'szie'.*did you mean 'size'"):
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


def _assert_sentence(error: pytest.ExceptionInfo, facts: list[str]) -> None:
    message = str(error.value)
    assert "\n" not in message
    assert all(fact in message for fact in facts), message
