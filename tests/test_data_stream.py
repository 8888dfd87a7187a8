"""Streams over real shards: who reads what, in which order, and what happens to bad samples."""

import io
import pickle
import random
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import IterableDataset
from webdataset.writer import TarWriter

from mhla_lightning.data.batching import deal_shards
from mhla_lightning.data.index import ShardIndex, offsets_path, write_index
from mhla_lightning.data.loader import LoaderOptions, StartMethod, build_loader, shut_down
from mhla_lightning.data.reading import read_range, read_shard
from mhla_lightning.data.shards import describe_shard
from mhla_lightning.data.stream import Batch, EvalStream, TrainStream
from mhla_lightning.data.transforms import Augmentation, eval_transform, train_transform
from mhla_lightning.errors import DataError

SIZES = [5, 1, 7, 3, 6, 2, 4, 8]  # uneven on purpose
PLAIN = Augmentation(auto_augment=None, re_prob=0.0)


def _png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value % 256, 0, 0)).save(buffer, format="PNG")
    return buffer.getvalue()


def _sample(index: int) -> dict:
    return {"__key__": f"{index:08d}", "png": _png(index), "cls": str(index % 3).encode()}


def _make_split(folder: Path, sizes: list[int], changes: dict[int, dict] | None = None) -> ShardIndex:
    """Shards of these sizes; `changes` replaces members of the samples with these global indices (None removes one)."""
    folder.mkdir(parents=True, exist_ok=True)
    entries, first = [], 0
    for number, size in enumerate(sizes):
        path = folder / f"{number:03d}.tar"
        with open(path, "wb") as file, TarWriter(file, mtime=0, encoder=False, compress=False) as tar:
            for index in range(first, first + size):
                members = _sample(index) | (changes or {}).get(index, {})
                tar.write({name: value for name, value in members.items() if value is not None})
        first += size
        entry, offsets = describe_shard(path)
        np.save(offsets_path(folder, path.name), offsets, allow_pickle=False)
        entries.append(entry)
    shards = ShardIndex("images", tuple(entries), ("a", "b", "c"))
    write_index(folder, shards)
    return shards


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ShardIndex]:
    folder = tmp_path_factory.mktemp("split")
    return folder, _make_split(folder, SIZES)


def _train(folder: Path, index: ShardIndex, rank: int = 0, world: int = 1, **options: int | float) -> TrainStream:
    return TrainStream(folder, index, train_transform(8, PLAIN), 4, rank=rank, world_size=world, **options)  # type: ignore[arg-type]


def _eval(folder: Path, index: ShardIndex, rank: int = 0, world: int = 1, share: float = 0.01) -> EvalStream:
    return EvalStream(folder, index, eval_transform(8, PLAIN), 4, (8, 8), rank, world, share)


def _batches(stream: IterableDataset[Batch], workers: int, count: int | None = None, start: StartMethod | None = None) -> Iterator[Batch]:
    loader = build_loader(stream, LoaderOptions(workers, start_method=start))
    try:
        yield from islice(loader, count)
    finally:
        shut_down(loader)


def _pairs(batches: Iterable[Batch]) -> list[tuple[int, int]]:
    return [pair for batch in batches for pair in zip(batch["epoch"].tolist(), batch["index"].tolist(), strict=True)]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_every_sample_exactly_once_in_every_epoch(split: tuple[Path, ShardIndex], world: int, workers: int) -> None:
    folder, index = split
    pairs = [pair for rank in range(world) for pair in _pairs(_batches(_train(folder, index, rank, world), workers, 60))]
    assert len(set(pairs)) == len(pairs), "a sample came twice in an epoch"
    for epoch in (0, 1):  # 60 batches go far beyond the second epoch on every worker
        assert sorted(i for e, i in pairs if e == epoch) == list(range(sum(SIZES)))


def test_order_follows_seed_and_epoch(split: tuple[Path, ShardIndex]) -> None:
    first, again, other = (_pairs(islice(_train(*split, seed=seed), 18)) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    unmixed = _pairs(islice(_train(*split, shuffle_buffer=1), 18))  # the order of the shards alone
    assert [i for e, i in unmixed if e == 0] != [i for e, i in unmixed if e == 1]


def test_one_shard_is_mixed_anew_in_every_epoch(tmp_path: Path) -> None:
    pairs = _pairs(islice(_train(tmp_path, _make_split(tmp_path, [20])), 10))
    orders = [[i for e, i in pairs if e == epoch] for epoch in (0, 1)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(20))
    assert orders[0] != orders[1] != list(range(20))


def test_a_later_epoch_can_be_the_first(split: tuple[Path, ShardIndex]) -> None:
    """A resumed run continues with the order that the uninterrupted one would have had."""
    whole = _pairs(islice(_train(*split), 30))
    resumed = _pairs(islice(_train(*split, first_epoch=2), 5))
    assert [pair for pair in whole if pair[0] == 2][: len(resumed)] == resumed


def test_batch_has_the_documented_types(split: tuple[Path, ShardIndex]) -> None:
    batch = next(iter(_train(*split)))
    shapes = {name: (value.dtype, tuple(value.shape)) for name, value in batch.items() if isinstance(value, torch.Tensor)}
    int64, float32 = torch.int64, torch.float32
    assert shapes == {
        "index": (int64, (4,)),
        "epoch": (int64, (4,)),
        "weight": (float32, (4,)),
        "image": (float32, (4, 3, 8, 8)),
        "label": (int64, (4,)),
        "skipped": (int64, ()),
    }
    assert [int(key) for key in batch["key"]] == batch["index"].tolist()
    assert batch["label"].tolist() == [index % 3 for index in batch["index"].tolist()]


def test_augmentation_does_not_depend_on_ranks_or_workers(split: tuple[Path, ShardIndex]) -> None:
    one = _images_of(_batches(_train(*split, shuffle_buffer=1), 0, 12))
    many = _images_of(_batches(_train(*split, rank=1, world=2), 2, 8))
    common = one.keys() & many.keys()
    assert len(common) > 10
    assert all(torch.equal(one[place], many[place]) for place in common)


def _images_of(batches: Iterable[Batch]) -> dict[tuple[int, int], torch.Tensor]:
    return {pair: image for batch in batches for pair, image in zip(_pairs([batch]), batch["image"], strict=True)}


def test_spawned_workers_read_disjoint_parts(split: tuple[Path, ShardIndex], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")  # a stale one from a launcher must not matter
    monkeypatch.setenv("WORLD_SIZE", "7")
    folder, index = split
    pairs = _pairs(_batches(_train(folder, index, 1, 2), 2, 20, "spawn"))
    order = sorted({i for e, i in pairs if e == 0})
    assert len(set(pairs)) == len(pairs)
    assert order == sorted(_indices_of_rank(index, 1, 2))


def _indices_of_rank(index: ShardIndex, rank: int, world: int) -> list[int]:
    shards = list(range(len(index.shards)))
    random.Random("0/shards/0").shuffle(shards)
    firsts = index.first_indices()
    return [i for shard in deal_shards(shards, rank, world, 0, 1) for i in range(firsts[shard], firsts[shard + 1])]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("sizes", [SIZES, [9, 1], [1]])
def test_validation_is_exact_and_even(tmp_path: Path, world: int, workers: int, sizes: list[int]) -> None:
    index = _make_split(tmp_path, sizes)
    ranks = [list(_batches(_eval(tmp_path, index, rank, world), workers)) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    batches = [batch for rank in ranks for batch in rank]
    assert all(batch["image"].shape == (4, 3, 8, 8) for batch in batches)
    assert sum(batch["weight"].sum().item() for batch in batches) == sum(sizes)
    kept = sorted(i for batch in batches for i, w in zip(batch["index"].tolist(), batch["weight"].tolist(), strict=True) if w)
    assert kept == list(range(sum(sizes)))
    assert all(i == -1 for batch in batches for i, w in zip(batch["index"].tolist(), batch["weight"].tolist(), strict=True) if not w)


def test_a_sample_is_read_by_its_offset(split: tuple[Path, ShardIndex]) -> None:
    folder, index = split
    for start, stop in [(0, 1), (5, 6), (4, 15), (35, 36)]:
        samples = list(read_range(folder, index, start, stop))
        assert [(s["__index__"], s["__key__"], s["png"]) for s in samples] == [(i, f"{i:08d}", _png(i)) for i in range(start, stop)]


BAD_MEMBERS: dict[str, dict] = {
    "broken image": {"png": _png(0)[:40]},
    "no image by its bytes": {"png": b"%!PS-Adobe-3.0 EPSF-3.0"},
    "no image": {"png": None},
    "no label": {"cls": None},
    "label is text": {"cls": b"cat"},
    "label too large": {"cls": b"3"},
    "label negative": {"cls": b"-1"},
    "label of many digits": {"cls": b"9" * 5000},
}


@pytest.mark.parametrize("change", BAD_MEMBERS.values(), ids=BAD_MEMBERS)
def test_bad_samples_are_skipped_and_counted(tmp_path: Path, change: dict) -> None:
    index = _make_split(tmp_path, [30], {3: change})
    batches = list(islice(_train(tmp_path, index, max_skipped_share=0.1), 29))  # 29 x 4 samples are four epochs of 29
    assert sum(batch["skipped"].item() for batch in batches) == 4
    assert 3 not in {i for _, i in _pairs(batches)}
    evaluated = list(_eval(tmp_path, index, share=0.1))
    assert sum(batch["skipped"].item() for batch in evaluated) == 1
    assert sum(batch["weight"].sum().item() for batch in evaluated) == 29


def test_only_jpeg_and_png_reach_pil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PIL starts an external program for PostScript, whatever the member is called."""
    opened: list[object] = []
    monkeypatch.setattr(Image, "open", opened.append)
    index = _make_split(tmp_path, [2], dict.fromkeys(range(2), BAD_MEMBERS["no image by its bytes"]))
    with pytest.raises(DataError, match="neither JPEG nor PNG"):
        next(iter(_train(tmp_path, index)))
    assert not opened


def test_decompression_bomb_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = _make_split(tmp_path, [30])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30)  # an image of 64 pixels is more than twice that
    with pytest.raises(DataError, match="decompression bomb"):
        next(iter(_train(tmp_path, index)))


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_samples_end_the_run(tmp_path: Path, workers: int) -> None:
    index = _make_split(tmp_path, [60, 60], {i: {"cls": b"7"} for i in range(0, 120, 10)})
    for stream in (_train(tmp_path, index), _eval(tmp_path, index)):
        with pytest.raises(DataError) as error:
            list(_batches(stream, workers, 1000))
        message = str(error.value)
        assert "\n" not in message
        for fact in ("data.max_skipped_share 0.01", "(10.0%)" if workers else "%", "the last is 0", ".tar", "cls is b'7'"):
            assert fact in message, message


@pytest.mark.parametrize("limit", [0.01, 1.0])
def test_all_bad_ends(tmp_path: Path, limit: float) -> None:
    index = _make_split(tmp_path, [3, 3], dict.fromkeys(range(6), {"png": b"x"}))
    with pytest.raises(DataError, match=r"of \d samples \(100.0%\) cannot be decoded"):
        next(iter(_train(tmp_path, index, max_skipped_share=limit)))


def test_fewer_shards_than_readers_ends(split: tuple[Path, ShardIndex]) -> None:
    with pytest.raises(DataError, match="8 shards, fewer than 9 ranks x 1 workers"):
        next(iter(_train(*split, rank=8, world=9)))


@pytest.mark.parametrize("cut", ["between members", "inside a member", "foreign bytes"])
def test_a_cut_shard_is_told(tmp_path: Path, cut: str) -> None:
    index = _make_split(tmp_path, [6])
    path = tmp_path / "000.tar"
    data, offsets = path.read_bytes(), np.load(offsets_path(tmp_path, path.name))
    content = {"between members": data[: offsets[3]], "inside a member": data[: offsets[3] + 1600], "foreign bytes": b"\x1f" * len(data)}
    path.write_bytes(content[cut])
    with pytest.raises(DataError, match=r"000\.tar") as error:
        list(islice(_train(tmp_path, index), 3))
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match=r"000\.tar"):
        list(_eval(tmp_path, index))


def test_nothing_is_unpickled_or_run(tmp_path: Path) -> None:
    trap = pickle.dumps(_Trap(str(tmp_path / "sprung")))
    index = _make_split(tmp_path, [4], {i: {"pyd": trap, "pickle": trap, "pth": trap} for i in range(4)})
    assert next(iter(_train(tmp_path, index)))["skipped"] == 0
    with pytest.raises(DataError, match="pipe:touch"):
        list(read_shard(f"pipe:touch {tmp_path}/sprung", 1))
    assert not (tmp_path / "sprung").exists()


class _Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return open, (self.path, "w")
