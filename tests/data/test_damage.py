"""Damage to files, by the layer that sees it: each is one sentence that names the file, or training goes
on with every sample. Nothing hangs.
"""

from __future__ import annotations

import gzip
import hashlib
import multiprocessing
import os
import shutil
import tarfile
import threading
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import IterableDataset

from mhla_lightning.data.loader import build_loader, shut_down
from mhla_lightning.errors import DataError
from tests.helpers.damaged import (
    HUGE,
    SAMPLES,
    SHARDS,
    Damage,
    DataKind,
    DataSet,
    Member,
    all_of,
    assert_error,
    assert_refused,
    assert_run_says,
    assert_trains,
    entry_with,
    in_place_of,
    make_sparse,
    npy_claiming,
    pairs,
    refusal,
    train_batches,
)
from tests.helpers.errors import refused
from tests.helpers.marks import every_nth

pytestmark = [pytest.mark.timeout(30), pytest.mark.usefixtures("little_memory")]


def _no_offsets(data: DataSet) -> None:
    data.offsets().unlink()


def _flip(data: DataSet) -> None:
    data.change_bytes(900, bytes([data.shard().read_bytes()[900] ^ 1]))


def _unreadable(path: Path) -> None:
    """A file whose reads fail, also for root: what a disk does that loses a block."""
    path.symlink_to("/proc/self/mem")


def _offsets(values: list[int] | np.ndarray, dtype: Any = np.int64) -> Callable[[DataSet], None]:
    return lambda data: np.save(data.offsets(), np.array(values, dtype))


SHARD, OFFSETS = "train/001.tar", "train/001.tar.offsets.npy"
FILES: dict[str, Damage] = {
    "missing": Damage(lambda d: d.shard().unlink(), SHARD),
    "cut": Damage(lambda d: os.truncate(d.shard(), 5000), SHARD),
    "zero bytes": Damage(lambda d: os.truncate(d.shard(), 0), SHARD),
    "flipped bit": Damage(_flip, SHARD),
    "two shards changed places": Damage(lambda d: shutil.copy(d.shard(2), d.shard(1)), SHARD),
    "a folder": Damage(lambda d: in_place_of(d.shard(), Path.mkdir), SHARD),
    "a pipe that nobody writes to": Damage(lambda d: in_place_of(d.shard(), os.mkfifo), SHARD),
    "a link to nothing": Damage(
        lambda d: in_place_of(d.shard(), lambda path: path.symlink_to("nowhere")), SHARD
    ),
    "a link to a device": Damage(
        lambda d: in_place_of(d.shard(), lambda path: path.symlink_to("/dev/zero")), SHARD
    ),
    "compressed": Damage(lambda d: d.shard().write_bytes(gzip.compress(d.shard().read_bytes())), SHARD),
    "offsets cut": Damage(lambda d: os.truncate(d.offsets(), 150), OFFSETS),
    "offsets of another shard": Damage(_offsets([0, 512]), OFFSETS),
    "offsets do not grow": Damage(_offsets([0, 2048, 1024, *range(3072, 9217, 1024)][:9]), OFFSETS),
    "offsets beyond the shard": Damage(_offsets([*range(0, 8 * 1024, 1024), 10**9]), OFFSETS),
    "offsets between headers": Damage(_offsets([*range(100, 8 * 1024, 1024), 9000][:9]), SHARD),
    "offsets below 0": Damage(_offsets([-512, *range(0, 8 * 1024, 1024)][:9]), OFFSETS),
    "offsets as floats": Damage(_offsets(np.arange(9) * 1024, np.float64), OFFSETS),
    "offsets as objects": Damage(lambda d: np.save(d.offsets(), np.array([{}]), allow_pickle=True), OFFSETS),
    "offsets claim 100 GB": Damage(
        lambda d: d.offsets().write_bytes(npy_claiming("(13421772800,)", descr="'<i8'")),
        OFFSETS,
    ),
    "offsets of 100 GB": Damage(lambda d: make_sparse(d.offsets()), OFFSETS),
    "no offsets of tokens": Damage(lambda d: d.offsets().unlink(), OFFSETS, "tokens"),
    "no offsets of a cut shard": Damage(all_of(_no_offsets, lambda d: os.truncate(d.shard(), 5000)), SHARD),
}


@pytest.mark.parametrize("damage", FILES.values(), ids=FILES)
def test_a_damaged_file_is_told_before_training(tmp_path: Path, damage: Damage) -> None:
    assert_refused(tmp_path, damage, "check")


# What only reading can see: data.verify none, which is also what remote data get.


def _zeros(data: DataSet) -> None:
    start = int(np.load(data.offsets())[3])
    data.change_bytes(start, bytes(1024))


def _swap_offsets(data: DataSet) -> None:
    data.shards[2][0][0].data += bytes(600)  # two blocks more, so that its offsets differ
    data.write()
    shutil.copy(data.offsets(2), data.offsets(1))


READ: dict[str, Damage] = {
    "missing": Damage(lambda d: d.shard().unlink(), SHARD),
    "cut between members": Damage(lambda d: os.truncate(d.shard(), int(np.load(d.offsets())[3])), SHARD),
    "cut inside a member": Damage(lambda d: os.truncate(d.shard(), 5000), SHARD),
    "cut, without offsets": Damage(
        all_of(_no_offsets, lambda d: os.truncate(d.shard(), int(np.load(d.offsets(0))[3]))),
        SHARD,
    ),
    "zero bytes": Damage(lambda d: os.truncate(d.shard(), 0), SHARD),
    "zeros over a sample": Damage(_zeros, SHARD),
    "zeros over a sample, without offsets": Damage(all_of(_zeros, _no_offsets), SHARD),
    "foreign bytes": Damage(lambda d: d.change_bytes(0, b"\x1f" * d.shard().stat().st_size), SHARD),
    "foreign bytes, without offsets": Damage(
        all_of(_no_offsets, lambda d: d.shard().write_bytes(b"\x1f" * 9999)), SHARD
    ),
    "compressed": Damage(lambda d: d.shard().write_bytes(gzip.compress(d.shard().read_bytes())), SHARD),
    "compressed, without offsets": Damage(
        all_of(_no_offsets, lambda d: d.shard().write_bytes(gzip.compress(d.shard().read_bytes()))),
        SHARD,
    ),
    "a folder": Damage(lambda d: in_place_of(d.shard(), Path.mkdir), SHARD),
    "a pipe that nobody writes to": Damage(lambda d: in_place_of(d.shard(), os.mkfifo), SHARD),
    "a pipe, without offsets": Damage(
        all_of(_no_offsets, lambda d: in_place_of(d.shard(), os.mkfifo)), SHARD
    ),
    "a device": Damage(lambda d: in_place_of(d.shard(), lambda path: path.symlink_to("/dev/zero")), SHARD),
    "a disk that fails": Damage(lambda d: in_place_of(d.shard(), _unreadable), SHARD),
    "a disk that fails, without offsets": Damage(
        all_of(_no_offsets, lambda d: in_place_of(d.shard(), _unreadable)), SHARD
    ),
    "offsets of another shard": Damage(_swap_offsets, SHARD),
    "rows of tokens cut": Damage(lambda d: os.truncate(d.shard(), 2000), SHARD, "tokens"),
    "rows of tokens zeroed": Damage(lambda d: d.change_bytes(0, bytes(2048)), SHARD, "tokens"),
    "a sample of 100 GB": Damage(
        all_of(
            entry_with("bytes", HUGE),
            lambda d: make_sparse(d.shard()),
            _offsets([*range(0, 8 * 1024, 1024), HUGE]),
        ),
        SHARD,
    ),
}


@pytest.mark.parametrize("damage", every_nth(READ.values(), 3), ids=READ)
def test_damage_that_only_reading_sees(tmp_path: Path, damage: Damage) -> None:
    assert_refused(tmp_path, damage._replace(options={"verify": "none"}), "read")


def test_a_disk_that_fails_under_a_check(tmp_path: Path) -> None:
    """All of a shard is read for its sha256, not only what offsets point at."""
    data = DataSet(tmp_path, "images")
    data.change_index(
        lambda content: (
            content["shards"][1].update(samples=0, bytes=0),
            content.update(samples=SAMPLES * (SHARDS - 1)),
        )
    )
    in_place_of(data.shard(), _unreadable)
    np.save(data.offsets(), np.array([0]))
    assert_error(refusal(data.module()), "check", data.shard())


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
@pytest.mark.parametrize("verify", ["auto", "none"])
def test_a_shard_without_the_right_to_read(tmp_path: Path, verify: str) -> None:
    data = DataSet(tmp_path, "images")
    data.shard().chmod(0)
    assert_error(refusal(data.module(verify=verify)), "check" if verify == "auto" else "read", data.shard())


# While training


def _rewrite(path: Path) -> None:
    """Another file under the same name, as a copy that is made again leaves it."""
    path.with_suffix(".new").write_bytes(path.read_bytes()[::-1])
    path.with_suffix(".new").replace(path)


@pytest.mark.parametrize(
    ("change", "ends"),
    [
        (lambda path: os.truncate(path, 2000), True),
        (lambda path: os.truncate(path, 0), True),
        (lambda path: path.write_bytes(b"\x1f" * path.stat().st_size), True),
        (os.unlink, False),
        (_rewrite, False),
    ],
    ids=["cut", "emptied", "overwritten", "deleted", "replaced"],
)
def test_a_shard_changes_between_two_epochs(
    tmp_path: Path, change: Callable[[Path], object], ends: bool
) -> None:
    """An open file outlives its name, so deleting or replacing a shard does not disturb its readers."""
    data = DataSet(tmp_path, "images")
    module = data.module()
    module.check(1)
    batches = iter(module.train_dataloader())
    try:
        first = list(islice(batches, SHARDS))
        change(data.shard())
        if not ends:
            later = pairs(list(islice(batches, 2 * SHARDS)))
            assert sorted(pairs(first) + later) == [
                (epoch, index) for epoch in range(3) for index in range(SHARDS * SAMPLES)
            ]
        else:
            with refused(str(data.shard()), DataError) as error:
                list(islice(batches, 2 * SHARDS))
            assert "\n" not in str(error.value)
    finally:
        module.teardown("fit")


class _Stuck(IterableDataset):
    """Its worker cannot end: a thread of it waits for ever, as one does in a lock that was held while the
    process forked.
    """

    def __iter__(self) -> Iterator[dict]:
        threading.Thread(target=threading.Event().wait).start()
        while True:
            yield {"index": 0}


def test_a_worker_that_hangs_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.3
    )  # seconds that torch waits, twice
    loader = build_loader(_Stuck(), 1)
    assert next(iter(loader))["index"] == 0
    (worker,) = multiprocessing.active_children()
    shut_down(loader)
    worker.join(5)
    assert not worker.is_alive()


# What looks odd, and is whole


def _facts(tar: bytes) -> dict[str, Any]:
    """What an index says of these bytes."""
    return {"bytes": len(tar), "sha256": hashlib.sha256(tar).hexdigest()}


def _without_end(data: DataSet) -> None:
    os.truncate(data.shard(), int(np.load(data.offsets())[-1]))
    data.change_index(lambda content: content["shards"][1].update(_facts(data.shard().read_bytes())))
    data.offsets().unlink()


def _with_other_members(data: DataSet) -> None:
    data.change_sample(
        lambda sample: sample.extend([Member("folder", fields={"type": tarfile.DIRTYPE}), Member("README")])
    )


ODD: dict[str, tuple[DataKind, Callable[[DataSet], object]]] = {
    "no offsets of images": ("images", lambda d: d.offsets().unlink()),
    "no offsets of latents": ("latents", lambda d: d.offsets().unlink()),
    "offsets are a pipe": ("images", lambda d: in_place_of(d.offsets(), os.mkfifo)),
    "one name in two shards": (
        "images",
        all_of(lambda d: d.shards[0].__setitem__(0, d.shards[1][0]), DataSet.write),
    ),
    "one name twice in a shard": (
        "images",
        all_of(lambda d: d.shards[1].__setitem__(0, d.shards[1][5]), DataSet.write),
    ),
    "a folder and a file without a sample": ("images", _with_other_members),
    "no end-of-archive blocks": ("images", _without_end),
}


@pytest.mark.parametrize(("kind", "change"), ODD.values(), ids=ODD)
def test_odd_but_whole(tmp_path: Path, kind: DataKind, change: Callable[[DataSet], object]) -> None:
    data = DataSet(tmp_path, kind)
    change(data)
    assert_trains(data.module(), set())


@pytest.mark.parametrize(
    ("tar", "offsets"),
    [(bytes(1024), "with"), (bytes(1024), "without"), (b"", "with")],
    ids=["zeros", "zeros, no offsets", "no bytes"],
)
def test_an_empty_shard_in_the_middle(tmp_path: Path, tar: bytes, offsets: str) -> None:
    data = DataSet(tmp_path, "images")
    data.shards[1] = []
    data.write()
    data.shard().write_bytes(tar)
    data.change_index(lambda content: content["shards"][1].update(samples=0, **_facts(tar)))
    if offsets == "without":
        data.offsets().unlink()
    module = data.module()
    module.check(1)
    found = pairs(train_batches(module, 2 * (SHARDS - 1)))
    assert sorted(found) == [(epoch, index) for epoch in range(2) for index in range((SHARDS - 1) * SAMPLES)]


COMMANDS = {
    **{
        f"check: {name}": FILES[name]
        for name in (
            "missing",
            "flipped bit",
            "a pipe that nobody writes to",
            "offsets claim 100 GB",
            "compressed",
        )
    },
    **{
        f"read: {name}": READ[name]._replace(options={"verify": "none"})
        for name in ("missing", "cut inside a member", "zeros over a sample", "a pipe that nobody writes to")
    },
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", COMMANDS.values(), ids=COMMANDS)
def test_mhla_run_says_it_in_one_line(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Damage, workers: int
) -> None:
    assert_run_says(recipe, tmp_path / "data", damage, workers, capsys)
