"""An index for tar files as other people make them: read, or refused with the way out."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mhla_lightning.cli.main import main
from mhla_lightning.data.index import read_index
from mhla_lightning.data.kinds.images import decode_image
from mhla_lightning.data.prepare.indexing import index_shards
from mhla_lightning.data.prepare.verify import verify
from mhla_lightning.data.split import Split
from mhla_lightning.data.stores import LocalStore
from mhla_lightning.errors import DataError, UserError
from tests.helpers.errors import refused


def _image(value: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind == "JPEG" else {}
    Image.new("RGB", (8, 8), (value, value, value)).save(buffer, kind, **options)
    return buffer.getvalue()


def _tar(path: Path, members: Iterable[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            if name.endswith("/"):
                info.type = tarfile.DIRTYPE
            tar.addfile(info, io.BytesIO(data))
    return path


KINDS = {"webp": "WEBP", "png": "PNG", "jpg": "JPEG", "jpeg": "JPEG"}


def _pairs(values: Iterable[int], name: str = "{:06d}", image: str = "png", label: str = "cls") -> list:
    return [
        member
        for number, value in enumerate(values)
        for member in (
            (
                f"{name.format(number)}.{image}",
                _image(value, {"webp": "WEBP", "png": "PNG"}.get(image, "JPEG")),
            ),
            (f"{name.format(number)}.{label}", b"%d" % (value % 2)),
        )
    ]


def _read(folder: Path) -> list[tuple[int, int]]:
    """Mean and label of every sample, read as in training, with the offsets and without them."""
    index = read_index(folder)
    split = Split(index, LocalStore(folder))
    found = [
        (round(float(np.asarray(decode_image(sample)).mean())), int(sample["cls"]))
        for sample in split.read(range(split.samples))
    ]
    for offsets in folder.glob("*.offsets.npy"):
        offsets.unlink()
    bare = Split(index, LocalStore(folder))
    assert [sample["cls"] for sample in bare.read(range(bare.samples))] == [
        b"%d" % label for _, label in found
    ]
    return found


VALUES = [10, 21, 32, 43]
READ: dict[str, list[tuple[str, bytes]]] = {
    "WebP": _pairs(VALUES, image="webp"),
    "JPEG in capitals": _pairs(VALUES, image="JPG", label="CLS"),
    "jpeg": _pairs(VALUES, image="jpeg"),
    "jpg and jpeg mixed": [*_pairs(VALUES[:2], image="jpg"), *_pairs(VALUES[2:], "b{}", image="jpeg")],
    "a WebP called jpg": [
        member
        for number, value in enumerate(VALUES)
        for member in ((f"{number}.jpg", _image(value, "WEBP")), (f"{number}.cls", b"%d" % (value % 2)))
    ],
    "from the folder itself": [("./", b""), *_pairs(VALUES, "./{:03d}")],
    "in folders": [("train/", b""), *_pairs(VALUES[:2], "train/{}"), *_pairs(VALUES[2:], "train/x.y/{}")],
    "long names": _pairs(VALUES, "train/" + "folder-with-a-long-name/" * 12 + "{}"),
    "names in other letters": _pairs(VALUES, "ä/图{}"),
    "json beside": [
        member
        for number, value in enumerate(VALUES)
        for member in (
            *_pairs([value], f"{number}"),
            (f"{number}.json", b'{"label": 9}'),
            (f"{number}.txt", b"a caption"),
        )
    ],
    "files of a Mac": [("./._a.png", b"x"), ("./.DS_Store", b"x"), *_pairs(VALUES, "./{}")],
}


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["GNU", "PAX"])
@pytest.mark.parametrize("name", READ)
def test_shards_of_others_are_read(tmp_path: Path, name: str, form: int) -> None:
    _tar(tmp_path / "train" / "a.tar", READ[name], form)
    index_shards(str(tmp_path))
    assert verify(str(tmp_path)).problems == []
    found = _read(tmp_path / "train")
    assert [label for _, label in found] == [value % 2 for value in VALUES]
    assert np.abs(np.array([mean for mean, _ in found]) - VALUES).max() <= 1


def test_keys_may_begin_anew_in_each_shard(tmp_path: Path) -> None:
    shards = [[1, 2, 3], [4, 5, 6], [7]]
    for number, values in enumerate(shards):
        _tar(tmp_path / "train" / f"{number}.tar", _pairs(values))
    notes: list[str] = []
    index = index_shards(str(tmp_path), on_note=notes.append)["train"]
    assert index.keys_per_shard
    assert len(notes) == 1
    assert read_index(tmp_path / "train") == index
    assert verify(str(tmp_path)).problems == []
    assert _read(tmp_path / "train") == [(value, value % 2) for values in shards for value in values]


def test_few_equal_keys_and_copies_of_shards_are_mistakes(tmp_path: Path) -> None:
    _tar(tmp_path / "few" / "a.tar", _pairs([1, 2, 3, 4]))
    _tar(tmp_path / "few" / "b.tar", [*_pairs([9, 8, 7], "b{}"), *_pairs([5])])
    with refused(str(tmp_path / "few" / "b.tar"), DataError) as error:
        index_shards(str(tmp_path / "few"))
    assert "000000" in error.value.reason
    for number in range(2):
        _tar(tmp_path / "copies" / f"{number}.tar", _pairs([1, 2]))
    with refused(str(tmp_path / "copies" / "1.tar"), DataError) as error:
        index_shards(str(tmp_path / "copies"))
    assert "2 such samples" in error.value.reason
    assert not index_shards(str(_tar(tmp_path / "one" / "a.tar", _pairs([1])).parent))["one"].keys_per_shard


def _joined(folder: Path, second: list[tuple[str, bytes]]) -> tuple[Path, int]:
    first = _tar(folder.parent / "parts" / "1.tar", _pairs([1, 2])).read_bytes()
    both = first + _tar(folder.parent / "parts" / "2.tar", second).read_bytes()
    folder.mkdir()
    (folder / "both.tar").write_bytes(both)
    return folder / "both.tar", len(first)


def test_joined_tars_are_told_from_damage(tmp_path: Path) -> None:
    """The way out is followed: both parts are indexed, and no sample is lost."""
    path, cut = _joined(tmp_path / "train", _pairs([3, 4]))
    with refused(str(path), DataError) as error:
        index_shards(str(tmp_path / "train"))
    assert f"head -c {cut} " in error.value.reason
    assert f"tail -c +{cut + 1} " in error.value.reason
    data = path.read_bytes()
    path.unlink()
    (tmp_path / "train" / "first.tar").write_bytes(data[:cut])
    (tmp_path / "train" / "rest.tar").write_bytes(data[cut:])
    index_shards(str(tmp_path / "train"))
    assert [mean for mean, _ in _read(tmp_path / "train")] == [1, 2, 3, 4]
    (tmp_path / "train" / "rest.tar").write_bytes(data[cut:] + b"junk" * 300)
    with refused(str(tmp_path / "train" / "rest.tar"), DataError) as error:
        index_shards(str(tmp_path / "train"), overwrite=True)
    assert "damaged" in error.value.reason


def _gz(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)


REFUSED: dict[str, tuple[Callable[[Path], object], str, type[UserError], str]] = {
    "splits by the names of shards": (
        lambda p: [
            _tar(p / f"web-{split}-{number}.tar", _pairs([number], f"{split}{number}-{{}}"))
            for split in ("train", "validation")
            for number in range(2)
        ],
        "",
        UserError,
        "mv *validation*.tar val/",
    ),
    "splits of capitals": (
        lambda p: [_tar(p / f"{split}_0.tar", _pairs([1], split + "{}")) for split in ("TRAIN", "TEST")],
        "",
        UserError,
        "mv *TEST*.tar test/",
    ),
    "a folder validation": (
        lambda p: [_tar(p / split / "0.tar", _pairs([1])) for split in ("train", "validation")],
        "/validation",
        UserError,
        "rename it to val",
    ),
    "shards beside a split": (
        lambda p: (_tar(p / "train" / "0.tar", _pairs([1])), _tar(p / "1.tar", _pairs([1]))),
        "/1.tar",
        UserError,
        "train",
    ),
    "a sample without cls": (
        lambda p: _tar(p / "a.tar", [*_pairs([1, 2]), ("000002.png", _image(3)), ("000002.json", b"{}")]),
        "/a.tar",
        DataError,
        "sample 000002 has the members json, png and lacks cls",
    ),
    "classes as text": (
        lambda p: _tar(p / "a.tar", [("0.jpg", _image(3, "JPEG")), ("0.txt", b"cat")]),
        "/a.tar",
        DataError,
        "KEY.txt",
    ),
    "names of classes in cls": (
        lambda p: _tar(p / "a.tar", [("0.jpg", _image(3, "JPEG")), ("0.cls", b"n01440764")]),
        "/a.tar",
        DataError,
        "mhla data pack",
    ),
    "a BMP called jpg": (
        lambda p: _tar(p / "a.tar", [("0.jpg", _image(3, "BMP")), ("0.cls", b"0")]),
        "/a.tar",
        DataError,
        "neither JPEG, PNG nor WebP",
    ),
    "gzip inside": (
        lambda p: (p / "a.tar").write_bytes(_gz(_tar(p.parent / "x.tar", _pairs([1])).read_bytes())),
        "/a.tar",
        DataError,
        "gzip",
    ),
    "xz inside": (
        lambda p: (p / "a.tar").write_bytes(lzma.compress(b"x" * 9000)),
        "/a.tar",
        DataError,
        "xz",
    ),
    "bzip2 inside": (
        lambda p: (p / "a.tar").write_bytes(bz2.compress(b"x" * 9000)),
        "/a.tar",
        DataError,
        "bzip2",
    ),
    "one of two is zstd": (
        lambda p: (_tar(p / "a.tar", _pairs([1])), (p / "b.tar.zst").write_bytes(b"x")),
        "/b.tar.zst",
        UserError,
        "unzstd",
    ),
    "one of two is TAR": (
        lambda p: (_tar(p / "a.tar", _pairs([1])), _tar(p / "b.TAR", _pairs([1]))),
        "/b.TAR",
        UserError,
        "rename it to b.tar",
    ),
    "jpg and JPG in one sample": (
        lambda p: _tar(p / "a.tar", [("0.jpg", _image(3)), ("0.JPG", _image(3)), ("0.cls", b"0")]),
        "/a.tar",
        DataError,
        "twice",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_read_is_refused_with_the_way_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    make, file, kind, says = REFUSED[name]
    folder = tmp_path / "data"
    folder.mkdir()
    make(folder)
    before = sorted(folder.rglob("*"))
    with refused(f"{folder}{file}", kind) as error:
        index_shards(str(folder))
    assert says in error.value.reason
    assert sorted(folder.rglob("*")) == before, "nothing is written"
    assert main(["data", "index", str(folder), "--workers", "1"]) == 2
    message = capsys.readouterr().err
    assert file in message
    assert says.split()[0] in message


def test_one_split_may_hold_any_names(tmp_path: Path) -> None:
    """A folder that is called train has said what it is; as have shards of one split anywhere."""
    for number, split in enumerate(("train", "val")):
        _tar(tmp_path / "train" / f"x-{split}-0.tar", _pairs([number], split + "{}"))
        _tar(tmp_path / "mine" / f"test-{split}s-{number}.tar", _pairs([number], split + "{}"))
    assert index_shards(str(tmp_path / "train"))["train"].samples == 2
    assert index_shards(str(tmp_path / "mine"))["mine"].samples == 2
