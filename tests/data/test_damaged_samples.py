"""Shards that are what their index says, and hold what they must not: refused in one sentence, or skipped
and counted. Nothing is unpickled.
"""

from __future__ import annotations

import io
import logging
import os
import pickle
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mhla_lightning.data.index import VAE
from mhla_lightning.data.members import scan_shard
from mhla_lightning.errors import DataError
from tests.helpers.damaged import (
    BAD,
    HUGE,
    LENGTH,
    VAE_USED,
    DataKind,
    DataSet,
    Member,
    Sample,
    assert_error,
    assert_trains,
    npy,
    npy_claiming,
    png,
    refusal,
)
from tests.helpers.errors import refused
from tests.helpers.marks import every_nth

pytestmark = [pytest.mark.timeout(30), pytest.mark.usefixtures("little_memory")]
KEY = f"{BAD:05d}"


def _type(kind: bytes, **fields: object) -> Callable[[Sample], None]:
    """The image becomes a member of another type, without data."""
    return lambda sample: sample.__setitem__(0, Member(sample[0].name, b"", {"type": kind, **fields}))


def _size(size: int, member: int = 0) -> Callable[[Sample], None]:
    return lambda sample: sample[member].fields.update(size=size)


def _insert(member: Member, place: int = 1) -> Callable[[Sample], None]:
    return lambda sample: sample.insert(place, member)


def _rename(name: str) -> Callable[[Sample], None]:
    return lambda sample: setattr(sample[0], "name", name)


def _nested_names(sample: Sample) -> None:
    """A long name for a long name for a long name ..."""
    sample[:0] = [Member("././@LongLink", b"x\0", {"type": tarfile.GNUTYPE_LONGNAME}) for _ in range(2000)]


# Each is refused when it is read by its position, and when a missing offsets file needs a scan.
REFUSED: dict[str, Callable[[Sample], object]] = {
    "symbolic link": _type(tarfile.SYMTYPE, linkname="/etc/passwd"),
    "hard link": _type(tarfile.LNKTYPE, linkname="00000.png"),
    "character device": _type(tarfile.CHRTYPE, devmajor=1, devminor=5),
    "block device": _type(tarfile.BLKTYPE, devmajor=8),
    "pipe": _type(tarfile.FIFOTYPE),
    "GNU sparse file": _type(tarfile.GNUTYPE_SPARSE),
    "absolute name": _rename("/etc/00010.png"),
    "name that climbs": _rename("a/../../00010.png"),
    "claims 100 GB": _size(HUGE),
    "claims 2**80 bytes": _size(2**80),
    "claims less than nothing": _size(-512),
    "second member claims less than nothing": _size(-2048, 1),
    "claims a few bytes more": _size(5000),
    "long name of 100 GB": _insert(Member("x", fields={"type": b"L", "size": HUGE}), 0),
    "attributes of 100 GB": _insert(Member("x", fields={"type": b"x", "size": HUGE}), 0),
    "attributes less than nothing": _insert(Member("x", fields={"type": b"x", "size": -1024}), 0),
    "attributes that are none": _insert(Member("x", b"0 comment=x\n", {"type": b"x"}), 0),
    "names nested 2000 deep": _nested_names,
    "a member twice": _insert(Member(f"{KEY}.cls", b"2")),
    "a member twice, in capitals": _insert(Member(f"{KEY}.CLS", b"2")),
    "a member of another sample inside": _insert(Member("00011.txt")),
    "name of two lines": _insert(Member(f"{KEY}\nerror: .cls")),
    "name that moves the cursor": _insert(Member(f"\x1b[2J{KEY}.cls")),
    "name of no text": _insert(Member("\udcff.cls")),
}


@pytest.mark.parametrize("offsets", ["with", "without"])
@pytest.mark.parametrize("change", every_nth(REFUSED.values(), 2), ids=REFUSED)
def test_refused_members(tmp_path: Path, change: Callable[[Sample], object], offsets: str) -> None:
    data = DataSet(tmp_path, "images")
    data.change_sample(change)
    if offsets == "without":
        data.offsets().unlink()
    assert_error(refusal(data.module()), "read" if offsets == "with" else "check", data.shard())


# What makes one sample unusable


def _image(data: bytes) -> Callable[[Sample], None]:
    return lambda sample: setattr(sample[0], "data", data)


def _label(data: bytes) -> Callable[[Sample], None]:
    return lambda sample: setattr(sample[1], "data", data)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png_of(width: int, height: int, *chunks: bytes) -> bytes:
    """A PNG that claims any size: a kilobyte that would become gigabytes."""
    return (
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + b"".join(chunks)
        + _chunk(b"IEND", b"")
    )


class _Trap:
    """Makes a file when it is unpickled."""

    def __reduce__(self) -> tuple:
        return open, (os.environ["TRAP"], "w")


def _objects() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([_Trap()]), allow_pickle=True)
    return buffer.getvalue()


ZIP_BOMB = _png_of(8, 8, _chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2 * 10**8))))
UNUSABLE: dict[str, tuple[DataKind, Callable[[Sample], object], str]] = {
    "image cut": ("images", _image(png(0)[:40]), "image cannot be decoded"),
    "image of no bytes": ("images", _image(b""), "neither JPEG, PNG nor WebP"),
    "PostScript": (
        "images",
        _image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n"),
        "neither JPEG, PNG nor WebP",
    ),
    "flipped bit in the image": (
        "images",
        _image(png(0)[:50] + bytes([png(0)[50] ^ 1]) + png(0)[51:]),
        "image cannot be decoded",
    ),
    "bomb of 100 megapixels": ("images", _image(_png_of(10_000, 10_000)), "at most 89,478,485 are read"),
    "bomb of 4 gigapixels": ("images", _image(_png_of(65_535, 65_535)), "at most 89,478,485 are read"),
    "bomb in a text chunk": ("images", _image(ZIP_BOMB), "image cannot be decoded"),
    "no image": ("images", lambda sample: sample.pop(0), "no member jpg or jpeg or png"),
    "image under another name": ("images", _rename(f"{KEY}.gif"), "no member jpg"),
    "no label": ("images", lambda sample: sample.pop(1), "no member cls"),
    "label below 0": ("images", _label(b"-1"), "cls is b'-1'"),
    "label too large": ("images", _label(b"3"), "it must be an integer from 0 to 2"),
    "label of 5,000 digits": ("images", _label(b"9" * 5000), "cls is b'9999"),
    "label as text": ("images", _label(b"cat\n\x1b[2J"), r"cls is b'cat\n\x1b[2J'"),
    "label of no bytes": ("images", _label(b""), "cls is b''"),
    "label as a float": ("images", _label(b"1.0"), "cls is b'1.0'"),
    "NaN": ("latents", _image(npy(np.full(VAE_USED.shape, np.nan, np.float32))), "NaN or infinite"),
    "infinity in half precision": (
        "latents",
        _image(npy(np.full(VAE_USED.shape, np.inf, np.float16))),
        "NaN or infinite",
    ),
    "latent of another shape": (
        "latents",
        _image(npy(np.zeros((2, 3, 4), np.float32))),
        "(2, 3, 4); in the index it is floats (2, 3, 3)",
    ),
    "latent of integers": ("latents", _image(npy(np.zeros(VAE_USED.shape, np.int32))), "int32"),
    "latent of objects": (
        "latents",
        lambda sample: setattr(sample[0], "data", _objects()),
        "no npy array that can be read (object",
    ),
    "latent cut": ("latents", _image(npy(np.zeros(VAE_USED.shape, np.float32))[:-1]), "does not fill"),
    "latent of 100 GB": ("latents", _image(npy_claiming("(26843545600,)")), "does not fill its 128 bytes"),
    "latent of no array": ("latents", _image(b"\x93NUMPY"), "no npy array"),
    "latent of negative dimensions": ("latents", _image(npy_claiming("(-2, -9)", bytes(72))), "is not read"),
    "latent of too many dimensions": (
        "latents",
        _image(npy_claiming(f"({'1, ' * 30}1)", bytes(4))),
        "no npy array|in the index",
    ),
    "latent of nothing, very wide": ("latents", _image(npy_claiming(f"(0, {10**30})")), "is not read"),
    "latent with a header of brackets": ("latents", _image(npy_claiming("(" * 60)), "no npy array"),
    "latent with a header of code": (
        "latents",
        _image(npy_claiming("__import__('os').getpid()")),
        "no npy array",
    ),
}


@pytest.mark.parametrize(
    ("kind", "change", "says"), every_nth(UNUSABLE.values(), 3, several=True), ids=UNUSABLE
)
def test_an_unusable_sample_is_skipped_and_counted(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    kind: DataKind,
    change: Callable[[Sample], object],
    says: str,
) -> None:
    monkeypatch.setenv("TRAP", str(tmp_path / "sprung"))
    data = DataSet(tmp_path / "data", kind)
    data.change_sample(change)
    assert_trains(data.module(), {BAD})
    _demand_reason(data, caplog, says)
    assert not (tmp_path / "sprung").exists()


def _demand_reason(data: DataSet, caplog: pytest.LogCaptureFixture, says: str) -> None:
    """The log of this process names sample, shard and reason in one line."""
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        list(data.module(num_workers=0).val_dataloader())
    (line,) = (record.getMessage() for record in caplog.records)
    assert line.isprintable()
    assert line.startswith(f"skipped {KEY if data.kind != 'tokens' else '001.tar'}")
    assert "001.tar: " in line
    assert any(word in line for word in says.split("|")), line


@pytest.mark.parametrize(
    ("column", "value", "says"),
    [
        (0, 100, "token 100 is outside the vocabulary of 100"),
        (1, 0, "document numbers of a row must not fall"),
    ],
)
def test_an_unusable_row_of_tokens_is_skipped_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, column: int, value: int, says: str
) -> None:
    data = DataSet(tmp_path, "tokens")
    row = np.ones((4, LENGTH), np.uint16)
    row[BAD % 4, LENGTH // 2] = value
    data.change_sample(lambda sample: setattr(sample[column], "data", npy(row)))
    assert_trains(data.module(), {BAD})
    _demand_reason(data, caplog, says)


ROWS: dict[str, Callable[[Sample], object]] = {
    "floats": _image(npy(np.ones((4, LENGTH), np.float32))),
    "signed": _image(npy(np.ones((4, LENGTH), np.int16))),
    "the other byte order": _image(npy(np.ones((4, LENGTH), ">u2"))),
    "columns first": _image(npy(np.asfortranarray(np.ones((4, LENGTH), np.uint16)))),
    "objects": _image(npy_claiming(f"(4, {LENGTH})", bytes(96), "'|O'")),
    "claims 100 GB": _image(npy_claiming(f"(8947848533, {LENGTH})", descr="'<u2'")),
    "a row less": _image(npy(np.ones((3, LENGTH), np.uint16))),
    "longer rows": _image(npy(np.ones((4, LENGTH + 1), np.uint16))),
    "one dimension": _image(npy(np.ones(24, np.uint16))),
    "no documents": lambda sample: sample.pop(1),
    "no tokens": lambda sample: sample.pop(0),
    "member claims 100 GB": _size(HUGE),
    "member claims less than nothing": _size(-512),
    "member steps back": _size(-1536),
    "another member steps back": _insert(Member("x.txt", fields={"size": -512}), 0),
    "attributes step back": _insert(Member("x", fields={"type": b"x", "size": -512}), 0),
    "name of two lines": _rename("a\nb.tokens.npy\x1b[2J"),
    "name of two lines, too long": lambda sample: sample.__setitem__(
        0, Member("a\nb.txt", fields={"size": HUGE})
    ),
}


@pytest.mark.parametrize("change", every_nth(ROWS.values(), 3), ids=ROWS)
def test_a_token_member_that_cannot_be_read(tmp_path: Path, change: Callable[[Sample], object]) -> None:
    """Rows are read by their position, so a wrong member is a fault of the shard, not of a row."""
    data = DataSet(tmp_path, "tokens")
    data.change_sample(change)
    assert_error(refusal(data.module()), "read", data.shard())


@pytest.mark.parametrize(
    "field", [{"name": "other"}, {"scale": 0.6}, {"shift": 0.0}, {"shape": (2, 3, 4)}], ids=str
)
def test_latents_of_another_vae(tmp_path: Path, field: dict) -> None:
    data = DataSet(tmp_path, "latents")
    wanted = VAE(**(vars(VAE_USED) | field))
    assert_error(refusal(data.module(vae=wanted)), "check", data.index)


def test_what_is_not_asked_for_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAP", str(tmp_path / "sprung"))
    trap = pickle.dumps(_Trap())
    data = DataSet(tmp_path / "data", "images")
    data.change_sample(
        lambda sample: sample.extend(
            Member(f"{KEY}.{name}", trap) for name in ("pyd", "pickle", "pth", "npy", "json")
        )
    )
    assert_trains(data.module(), set())
    assert not (tmp_path / "sprung").exists()
    pickle.loads(trap).close()
    assert (tmp_path / "sprung").exists(), "the trap itself works"


def test_attributes_and_long_names_are_read(tmp_path: Path) -> None:
    data = DataSet(tmp_path, "images")
    data.change_sample(
        lambda sample: sample.__setitem__(
            slice(None), [Member(m.name, m.data, pax={"comment": "é"}) for m in sample]
        )
    )
    assert_trains(data.module(), set())
    data.offsets().unlink()
    assert_trains(data.module(), set())


def test_a_sparse_file_in_attributes_is_refused(tmp_path: Path) -> None:
    """Its type says regular file; its attributes say that its bytes lie elsewhere."""
    data = DataSet(tmp_path, "images")
    pax = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": f"{KEY}.png",
        "GNU.sparse.realsize": str(HUGE),
    }
    data.change_sample(
        lambda sample: sample.__setitem__(
            0, Member(f"{KEY}.png", b"1\n0\n512\n".ljust(512, b"\0") + bytes(512), pax=pax)
        )
    )
    assert_error(refusal(data.module()), "read", data.shard())


def test_two_archives_in_one_file_are_not_half_read(tmp_path: Path) -> None:
    """tarfile stops at the first end-of-archive: what follows would be lost in silence when such a shard
    is indexed.
    """
    data = DataSet(tmp_path, "images")
    both = data.shard(0).read_bytes() + data.shard(1).read_bytes()
    with refused("both", DataError):
        scan_shard(io.BytesIO(both), "both")


def test_a_damaged_header_does_not_end_a_scan(tmp_path: Path) -> None:
    data = DataSet(tmp_path, "images")
    data.change_bytes(int(np.load(data.offsets())[5]), b"\x1f" * 100)
    with refused("x", DataError), open(data.shard(), "rb") as file:
        scan_shard(file, "x")
