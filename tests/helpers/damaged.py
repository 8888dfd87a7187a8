"""Small data sets on disk that can be damaged anywhere, and what a data module makes of them."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pytest
from PIL import Image

from mhla_lightning.cli.main import main
from mhla_lightning.data import Augmentation, ImageDataModule, LatentDataModule, TokenDataModule
from mhla_lightning.data.index import VAE, ShardEntry, ShardIndex, write_index
from mhla_lightning.data.modules.base import ShardDataModule
from mhla_lightning.data.stream import Batch
from mhla_lightning.errors import DataError, UserError
from tests.helpers.data_modules import build

DataKind = Literal["images", "latents", "tokens"]
HUGE = 100 * 2**30
SHARDS, SAMPLES, LENGTH = 4, 8, 6  # shards of train/, samples of each, tokens of a row
BAD = SAMPLES + 2  # index of sample 2 of shard 1, the one that is damaged when only one is
VAE_USED = VAE("test", 0.5, 0.25, (2, 3, 3))
PLAIN = Augmentation(auto_augment=None, re_prob=0.0)


@dataclass
class Member:
    """A member of a tar file. fields: of its header, whatever the truth (size, type, linkname); pax:
    extended attributes.
    """

    name: str
    data: bytes = b""
    fields: dict[str, Any] = field(default_factory=dict)
    pax: dict[str, str] = field(default_factory=dict)

    def packed(self) -> bytes:
        """Header and data as they stand in the file."""
        info = tarfile.TarInfo(self.name)
        info.size = len(self.data)
        info.pax_headers = self.pax
        for name, value in self.fields.items():
            setattr(info, name, value)
        header = info.tobuf(
            tarfile.PAX_FORMAT if self.pax else tarfile.GNU_FORMAT, "utf-8", "surrogateescape"
        )
        return header + self.data + bytes(-len(self.data) % tarfile.BLOCKSIZE)


Sample = list[Member]


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def npy_claiming(shape: str, data: bytes = b"", descr: str = "'<f4'") -> bytes:
    """An npy file whose header says anything."""
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".ljust(117).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


def png(value: int, size: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (value % 256, 0, 0)).save(buffer, format="PNG")
    return buffer.getvalue()


def whole_sample(kind: DataKind, number: int) -> Sample:
    key = f"{number:05d}"
    if kind == "images":
        return [Member(f"{key}.png", png(5 * number)), Member(f"{key}.cls", b"%d" % (number % 3))]
    if kind == "latents":
        return [
            Member(f"{key}.latent.npy", npy(np.full(VAE_USED.shape, number, np.float32))),
            Member(f"{key}.cls", b"%d" % (number % 3)),
        ]
    tokens = np.full((4, LENGTH), number, np.uint16)  # four rows, which are four samples
    return [
        Member(f"{key}.tokens.npy", npy(tokens)),
        Member(f"{key}.documents.npy", npy(np.sort(tokens % 3))),
    ]


class DataSet:
    """train/ of four shards with eight samples each, and val/ of the first two of these, written by
    `write` as `shards` says.
    """

    def __init__(self, root: Path, kind: DataKind) -> None:
        self.root, self.kind = root, kind
        self.rows = 4 if kind == "tokens" else 1
        each = SAMPLES // self.rows
        self.shards = [[whole_sample(kind, shard * each + n) for n in range(each)] for shard in range(SHARDS)]
        self.write()

    def write(self) -> None:
        for name, shards in (("train", self.shards), ("val", self.shards[:2])):
            self._write_split(self.root / name, shards)

    def _write_split(self, folder: Path, shards: list[list[Sample]]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        entries = []
        for number, samples in enumerate(shards):
            pieces = [b"".join(member.packed() for member in sample) for sample in samples]
            starts = np.cumsum([0, *map(len, pieces)], dtype=np.int64)
            data = b"".join(pieces) + bytes(2 * tarfile.BLOCKSIZE)
            path = folder / f"{number:03d}.tar"
            path.write_bytes(data)
            np.save(f"{path}.offsets.npy", np.append(np.repeat(starts[:-1], self.rows), starts[-1]))
            entries.append(
                ShardEntry(path.name, len(samples) * self.rows, len(data), hashlib.sha256(data).hexdigest())
            )
        vae, classes = (
            (VAE_USED if self.kind == "latents" else None),
            () if self.kind == "tokens" else ("a", "b", "c"),
        )
        tokens: tuple[str, int] | tuple[None, None] = (
            ("bytes", LENGTH) if self.kind == "tokens" else (None, None)
        )
        write_index(folder, ShardIndex(self.kind, tuple(entries), classes, tokens[0], vae, tokens[1]))

    def shard(self, number: int = 1) -> Path:
        return self.root / "train" / f"{number:03d}.tar"

    def offsets(self, number: int = 1) -> Path:
        return self.root / "train" / f"{number:03d}.tar.offsets.npy"

    @property
    def index(self) -> Path:
        return self.root / "train" / "index.json"

    def change_index(self, change: Callable[[dict[str, Any]], object]) -> None:
        """Edit index.json and leave its hash right, so that the hash is not what gives it away."""
        content = json.loads(self.index.read_text())
        change(content)
        lines = "".join(
            f"{shard['name']} {shard['sha256']} {shard['samples']}\n" for shard in content["shards"]
        )
        content["hash"] = hashlib.sha256(lines.encode("utf-8", "surrogatepass")).hexdigest()
        self.index.write_text(json.dumps(content))

    def change_bytes(self, start: int, new: bytes, number: int = 1) -> None:
        """Overwrite bytes of a shard, and leave everything else."""
        data = bytearray(self.shard(number).read_bytes())
        data[start : start + len(new)] = new
        self.shard(number).write_bytes(data)

    def change_sample(self, change: Callable[[Sample], object]) -> None:
        """Make the sample BAD anew, with an index and offsets that fit."""
        change(self.shards[1][(BAD - SAMPLES) // self.rows])
        self.write()

    def module(self, **options: Any) -> ShardDataModule:
        common: dict[str, Any] = {
            "path": str(self.root),
            "batch_size": 8,
            "num_workers": 2,
            "max_skipped_share": 0.5,
            "lanes": 4,
            "window": 8,
        }
        common |= options
        if self.kind == "images":
            return build(ImageDataModule, image_size=8, augmentation=PLAIN, **common)
        return (
            build(LatentDataModule, **({"vae": VAE_USED} | common))
            if self.kind == "latents"
            else build(TokenDataModule, vocabulary=100, **common)
        )


def train_batches(module: ShardDataModule, count: int) -> list[Batch]:
    """The first batches of a training loader."""
    try:
        return list(islice(module.train_dataloader(), count))
    finally:
        module.teardown("fit")


def refusal(module: ShardDataModule) -> tuple[str, UserError]:
    """Check, train for three epochs, and return (check or read, the error); fail without an error."""
    layer = "check"
    try:
        module.check(1)
        layer = "read"
        train_batches(module, 3 * SHARDS)
    except UserError as error:
        return layer, error
    raise AssertionError("neither the check nor three epochs raised an error")


def pairs(batches: list[Batch]) -> list[tuple[int, int]]:
    return [
        pair
        for batch in batches
        for pair in zip(batch["epoch"].tolist(), batch["index"].tolist(), strict=True)
    ]


def assert_trains(module: ShardDataModule, bad: set[int]) -> None:
    """Assert that three epochs and validation hold every sample, except those in `bad`.

    The bad ones are counted, and the next good sample takes their place.
    """
    module.check(1)
    count = 3 * SHARDS
    batches = train_batches(module, count)
    places = [(place.epoch, place.index) for place in module.corpus.locate(np.arange(8 * count + 8))]
    wanted, stand_in = [], next(place for place in places[8 * count :] if place[1] not in bad)
    for place in reversed(places[: 8 * count]):
        stand_in = stand_in if place[1] in bad else place
        wanted.append(stand_in)
    assert pairs(batches) == wanted[::-1]
    assert sum(int(batch["skipped"]) for batch in batches) == 3 * len(bad)
    assert {index for _, index in places} == set(range(SHARDS * SAMPLES))
    val = list(module.val_dataloader())
    module.teardown("fit")
    kept = [
        index
        for batch in val
        for index, weight in zip(batch["index"].tolist(), batch["weight"].tolist(), strict=True)
        if weight
    ]
    assert kept == [index for index in range(2 * SAMPLES) if index not in bad]
    assert sum(int(batch["skipped"]) for batch in val) == len(bad)


class Damage(NamedTuple):
    """do: the damage; file: the error's key below the data set; options: of the data module."""

    do: Callable[[DataSet], object]
    file: str
    kind: DataKind = "images"
    options: dict[str, Any] = {}  # noqa: RUF012


def all_of(*changes: Callable[[DataSet], object]) -> Callable[[DataSet], None]:
    def change(data: DataSet) -> None:
        for one in changes:
            one(data)

    return change


def entry_with(name: str, value: Any) -> Callable[[DataSet], None]:
    """Change a value of the second shard's entry in index.json."""
    return lambda data: data.change_index(lambda content: content["shards"][1].update({name: value}))


def make_sparse(path: Path, size: int = HUGE) -> None:
    """A file that claims `size` bytes and takes none on the disk."""
    path.touch()
    os.truncate(path, size)


def in_place_of(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


def assert_refused(root: Path, damage: Damage, layer: str) -> None:
    """Assert that this layer (check or read) refuses the damage, with the file as the key, in one line."""
    data = DataSet(root, damage.kind)
    damage.do(data)
    assert_error(refusal(data.module(**damage.options)), layer, root / damage.file)


def assert_error(found: tuple[str, UserError], layer: str, file: Path | str) -> None:
    assert (found[0], type(found[1]), found[1].key) == (layer, DataError, str(file)), found
    assert str(found[1]).isprintable()


def assert_run_says(
    recipe: Path, root: Path, damage: Damage, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """`mhla run` on damaged data ends with exit code 2, one line for the user and no traceback."""
    data = DataSet(root, "images")
    damage.do(data)
    options = [part for name, value in damage.options.items() for part in (f"--data.reading.{name}", value)]
    arguments = [
        "--model.num_classes",
        "3",
        "--data.path",
        str(root),
        "--data.reading.num_workers",
        str(workers),
        "--data.batch_size",
        "8",
    ]
    assert main(["run", str(recipe), *arguments, *options]) == 2
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    (error,) = (line for line in shown.splitlines() if line.startswith("error: "))
    assert str(root / damage.file) in error
