"""Streams over real shards: who reads what, in which order, and what happens to bad samples."""

import io
import pickle
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import IterableDataset
from webdataset.writer import TarWriter

from mhla_lightning.data.batching import RankPart
from mhla_lightning.data.corpus import Corpus, DataSource, TrainCorpus
from mhla_lightning.data.index import ShardIndex, offsets_path, write_index
from mhla_lightning.data.kinds import Images
from mhla_lightning.data.loader import Loading, StartMethod, build_loader, shut_down
from mhla_lightning.data.prepare.shards import describe_shard
from mhla_lightning.data.split import Split
from mhla_lightning.data.stores import LocalStore, Store, open_store
from mhla_lightning.data.stream import Batch, EvalStream, TrainStream
from mhla_lightning.data.transforms import Augmentation
from mhla_lightning.errors import DataError
from tests.helpers.errors import refused

SIZES = [5, 1, 7, 3, 6, 2, 4, 8]  # uneven on purpose
PLAIN = Augmentation(auto_augment=None, re_prob=0.0)


def _png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value % 256, 0, 0)).save(buffer, format="PNG")
    return buffer.getvalue()


def _sample(index: int) -> dict:
    return {"__key__": f"{index:08d}", "png": _png(index), "cls": str(index % 3).encode()}


def _make_split(folder: Path, sizes: list[int], changes: dict[int, dict] | None = None) -> ShardIndex:
    """Shards of these sizes; `changes` replaces members of the samples with these global indices (None
    removes one).
    """
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


def _part(rank: int = 0, world: int = 1, first: int = 0) -> RankPart:
    return RankPart(rank, world, 4 * world, 4, first)


def _split(folder: Path, index: ShardIndex) -> Split:
    return Split(index, open_store(folder))


def _images(seed: int = 0) -> Images:
    return Images(3, (8, 8), PLAIN, seed)


def _train(
    folder: Path,
    index: ShardIndex,
    part: RankPart | None = None,
    seed: int = 0,
    share: float = 0.01,
    window: int = 16,
) -> TrainStream:
    corpus = TrainCorpus([_split(folder, index)], [DataSource(str(folder))], seed, 12, window)
    return TrainStream(corpus, _images(seed), part or _part(), share)


def _eval(folder: Path, index: ShardIndex, rank: int = 0, world: int = 1, share: float = 0.01) -> EvalStream:
    return EvalStream(Corpus([_split(folder, index)]), _images(), 4, rank, world, share)


def _batches(
    stream: IterableDataset[Batch], workers: int, count: int | None = None, start: StartMethod | None = None
) -> Iterator[Batch]:
    loader = build_loader(stream, workers, Loading(start_method=start))
    try:
        yield from islice(loader, count)
    finally:
        shut_down(loader)


def _pairs(batches: Iterable[Batch]) -> list[tuple[int, int]]:
    return [
        pair
        for batch in batches
        for pair in zip(batch["epoch"].tolist(), batch["index"].tolist(), strict=True)
    ]


@pytest.mark.filterwarnings(
    "ignore:This DataLoader will create 3 worker processes"
)  # more than the cores of a small machine: on purpose
@pytest.mark.parametrize("workers", [0, 2, 3])
def test_workers_do_not_change_the_sequence(split: tuple[Path, ShardIndex], workers: int) -> None:
    pairs = _pairs(_batches(_train(*split), workers, 30))  # three epochs and more
    corpus = _train(*split).corpus
    assert pairs == [(place.epoch, place.index) for place in corpus.locate(np.arange(120))]
    for epoch in range(3):
        assert sorted(i for e, i in pairs if e == epoch) == list(range(sum(SIZES)))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_sequence(split: tuple[Path, ShardIndex], world: int, workers: int) -> None:
    ranks = [list(_batches(_train(*split, _part(rank, world)), workers, 12)) for rank in range(world)]
    together = [sorted(_pairs(batches)) for batches in zip(*ranks, strict=True)]
    places = _train(*split).corpus.locate(np.arange(12 * 4 * world))
    alone = [(place.epoch, place.index) for place in places]
    assert together == [sorted(alone[start : start + 4 * world]) for start in range(0, len(alone), 4 * world)]


@pytest.mark.parametrize("workers", [0, 2])
def test_any_position_can_be_the_first(split: tuple[Path, ShardIndex], workers: int) -> None:
    """A resumed run goes on with the very next sample, augmented as it would have been."""
    whole = list(_batches(_train(*split), 0, 30))
    resumed = list(_batches(_train(*split, _part(first=4 * 13)), workers, 17))
    assert [batch["key"] for batch in resumed] == [batch["key"] for batch in whole[13:]]
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(resumed, whole[13:], strict=True))


def test_a_resumed_stream_opens_only_what_it_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = _make_split(tmp_path, [4] * 100)
    stream = _train(tmp_path, index, _part(first=360), window=4)
    read: list[str] = []

    def noted(store: LocalStore, name: str, *args: int) -> bytes:
        read.append(name)
        return _plain_read(store, name, *args)

    monkeypatch.setattr(LocalStore, "read", noted)
    next(iter(stream))
    assert 1 <= len({name.removesuffix(".offsets.npy") for name in read}) <= 4


_plain_read = LocalStore.read


def test_batch_has_the_documented_types(split: tuple[Path, ShardIndex]) -> None:
    batch = next(iter(_train(*split)))
    shapes = {
        name: (value.dtype, tuple(value.shape))
        for name, value in batch.items()
        if isinstance(value, torch.Tensor)
    }
    int64, float32 = torch.int64, torch.float32
    assert shapes == {
        "index": (int64, (4,)),
        "epoch": (int64, (4,)),
        "source": (int64, (4,)),
        "weight": (float32, (4,)),
        "image": (float32, (4, 3, 8, 8)),
        "label": (int64, (4,)),
        "skipped": (int64, ()),
    }
    assert [int(key) for key in batch["key"]] == batch["index"].tolist()
    assert batch["label"].tolist() == [index % 3 for index in batch["index"].tolist()]


def test_augmentation_does_not_depend_on_ranks_or_workers(split: tuple[Path, ShardIndex]) -> None:
    one = _images_of(_batches(_train(*split), 0, 12))
    many = _images_of(_batches(_train(*split, _part(1, 2)), 2, 8))
    common = one.keys() & many.keys()
    assert len(common) > 10
    assert all(torch.equal(one[place], many[place]) for place in common)
    other = _images_of(_batches(_train(*split, seed=1), 0, 12))
    assert any(not torch.equal(one[place], other[place]) for place in one.keys() & other.keys())


def _images_of(batches: Iterable[Batch]) -> dict[tuple[int, int], torch.Tensor]:
    return {
        pair: image for batch in batches for pair, image in zip(_pairs([batch]), batch["image"], strict=True)
    }


@pytest.mark.parametrize("start", ["spawn", "forkserver"])
@pytest.mark.slow
def test_started_workers_read_their_part(
    split: tuple[Path, ShardIndex], monkeypatch: pytest.MonkeyPatch, start: StartMethod
) -> None:
    monkeypatch.setenv("RANK", "0")  # a stale one from a launcher must not matter
    monkeypatch.setenv("WORLD_SIZE", "7")
    pairs = _pairs(_batches(_train(*split, _part(1, 2)), 2, 20, start))
    assert pairs == _pairs(_batches(_train(*split, _part(1, 2)), 0, 20))


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
    kept = sorted(
        i
        for batch in batches
        for i, w in zip(batch["index"].tolist(), batch["weight"].tolist(), strict=True)
        if w
    )
    assert kept == list(range(sum(sizes)))
    assert all(
        i == -1
        for batch in batches
        for i, w in zip(batch["index"].tolist(), batch["weight"].tolist(), strict=True)
        if not w
    )


@pytest.mark.parametrize("offsets", ["with", "without"])
def test_samples_are_read_by_place(tmp_path: Path, offsets: str) -> None:
    """Any samples in any order; where the offsets are missing, one pass over the shard's headers finds
    them.
    """
    index = _make_split(tmp_path, SIZES)
    if offsets == "without":
        for path in tmp_path.glob("*.offsets.npy"):
            path.unlink()
    for wanted in ([0], [5], list(range(4, 15)), [35, 3, 4, 20, 5, 35]):
        samples = _split(tmp_path, index).read(wanted)
        assert [(s["__index__"], s["__key__"], s["png"]) for s in samples] == [
            (i, f"{i:08d}", _png(i)) for i in wanted
        ]


def test_neighbours_come_with_one_read(
    split: tuple[Path, ShardIndex], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = _split(*split)
    opened.read(range(36))  # the offsets are known afterwards
    asked: list[tuple[str, int, int]] = []

    def noted(store: LocalStore, requests: list[tuple[str, int, int]]) -> list[bytes]:
        asked.extend(requests)
        return Store.read_many(store, requests)

    monkeypatch.setattr(LocalStore, "read_many", noted)
    opened.read([2, 7, 1, 8, 0, 20])  # shards of 5, 1, 7, 3, 6, ... samples
    assert [name for name, _, _ in asked] == ["000.tar", "002.tar", "004.tar"]


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
    stream = _train(tmp_path, index, share=0.1)
    batches = list(islice(stream, 30))  # four epochs
    assert sum(batch["skipped"].item() for batch in batches) == 4
    assert 3 not in {i for _, i in _pairs(batches)}
    places = [(place.epoch, place.index) for place in stream.corpus.locate(np.arange(121))]
    assert _pairs(batches) == [places[n + 1] if places[n][1] == 3 else places[n] for n in range(120)], (
        "the next sample fills the slot"
    )
    evaluated = list(_eval(tmp_path, index, share=0.1))
    assert sum(batch["skipped"].item() for batch in evaluated) == 1
    assert sum(batch["weight"].sum().item() for batch in evaluated) == 29


def test_a_skipped_sample_is_replaced_alike_on_any_number_of_ranks(tmp_path: Path) -> None:
    index = _make_split(tmp_path, [30], {i: {"png": b"x"} for i in (3, 4, 17)})
    one = [
        sorted(_pairs([batch]))
        for batch in islice(
            TrainStream(_train(tmp_path, index).corpus, _images(), RankPart(0, 1, 8, 8), 0.9), 10
        )
    ]
    two = [
        islice(TrainStream(_train(tmp_path, index).corpus, _images(), RankPart(rank, 2, 8, 2), 0.9), 20)
        for rank in (0, 1)
    ]
    micro = [_pairs([a, b]) for a, b in zip(*two, strict=True)]
    assert [sorted(first + second) for first, second in zip(micro[::2], micro[1::2], strict=True)] == one


def test_only_jpeg_and_png_reach_pil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PIL starts an external program for PostScript, whatever the member is called."""
    opened: list[object] = []
    monkeypatch.setattr(Image, "open", opened.append)
    index = _make_split(tmp_path, [2], dict.fromkeys(range(2), BAD_MEMBERS["no image by its bytes"]))
    with refused(str(tmp_path / "000.tar"), DataError):
        next(iter(_train(tmp_path, index)))
    assert not opened


@pytest.mark.parametrize("pixels", [30, 60], ids=["error", "warning only"])
def test_decompression_bomb_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pixels: int) -> None:
    index = _make_split(tmp_path, [30])
    # An image has 64: above the limit PIL warns, above twice the limit it raises.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pixels)
    with refused(str(tmp_path / "000.tar"), DataError):
        next(iter(_train(tmp_path, index)))


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_samples_end_the_run(tmp_path: Path, workers: int) -> None:
    index = _make_split(tmp_path, [60, 60], {i: {"cls": b"7"} for i in range(0, 120, 10)})
    for stream in (_train(tmp_path, index), _eval(tmp_path, index)):
        with pytest.raises(DataError) as error:
            list(_batches(stream, workers, 1000))
        message = str(error.value)
        assert "\n" not in message
        assert error.value.key in {str(path) for path in tmp_path.glob("*.tar")}
        for fact in ("`data.reading.max_skipped_share`", "0.01", "cls is b'7'"):
            assert fact in message, message


@pytest.mark.parametrize("limit", [0.01, 1.0])
def test_all_bad_ends(tmp_path: Path, limit: float) -> None:
    index = _make_split(tmp_path, [3, 3], dict.fromkeys(range(6), {"png": b"x"}))
    with pytest.raises(DataError) as error:
        next(iter(_train(tmp_path, index, share=limit)))
    assert error.value.key in {str(path) for path in tmp_path.glob("*.tar")}


@pytest.mark.parametrize("cut", ["between members", "inside a member", "foreign bytes"])
def test_a_cut_shard_is_told(tmp_path: Path, cut: str) -> None:
    index = _make_split(tmp_path, [6])
    path = tmp_path / "000.tar"
    data, offsets = path.read_bytes(), np.load(offsets_path(tmp_path, path.name))
    content = {
        "between members": data[: offsets[3]],
        "inside a member": data[: offsets[3] + 1600],
        "foreign bytes": b"\x1f" * len(data),
    }
    path.write_bytes(content[cut])
    with refused(str(path), DataError) as error:
        list(islice(_train(tmp_path, index), 3))
    assert "\n" not in str(error.value)
    with refused(str(path), DataError):
        list(_eval(tmp_path, index))


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    trap = pickle.dumps(_Trap(str(tmp_path / "sprung")))
    index = _make_split(tmp_path, [4], {i: {"pyd": trap, "pickle": trap, "pth": trap} for i in range(4)})
    assert next(iter(_train(tmp_path, index)))["skipped"] == 0
    assert not (tmp_path / "sprung").exists()


class _Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return open, (self.path, "w")


# Mixtures


def test_a_mixture_reads_every_source(tmp_path: Path) -> None:
    splits = [
        _split(tmp_path / name, _make_split(tmp_path / name, sizes))
        for name, sizes in (("a", [20]), ("b", [7, 8]))
    ]
    sources = [DataSource("a", 3.0), DataSource("b", 1.0, when_exhausted="drop")]
    stream = TrainStream(TrainCorpus(splits, sources, 0, 4, 8), _images(), _part())
    batches = list(_batches(stream, 2, 100))
    found = [
        pair
        for batch in batches
        for pair in zip(batch["source"].tolist(), batch["index"].tolist(), batch["key"], strict=True)
    ]
    assert sorted(i for s, i, _ in found if s == 1) == list(range(20, 35)), (
        "source b once, its indices after those of a"
    )
    assert all(int(key) == (index if source == 0 else index - 20) for source, index, key in found)
    evaluated = list(EvalStream(Corpus(splits), _images(), 4))
    assert [i for batch in evaluated for i in batch["index"].tolist()] == [*range(35), -1]
    assert [s for batch in evaluated for s in batch["source"].tolist()] == [0] * 20 + [1] * 15 + [0]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_mixture_that_ends(tmp_path: Path, workers: int) -> None:
    """Workers read ahead of training, and the last sample cannot be decoded: its slot takes one before it."""
    folder = tmp_path / "a"
    order = TrainCorpus(
        [_split(folder, _make_split(folder, [12, 8]))], [DataSource("a", when_exhausted="stop")], 0, 4, 8
    )
    last = order.locate(np.array([19]))[0].index
    stopping = TrainCorpus(
        [_split(folder, _make_split(folder, [12, 8], {last: {"png": b"x"}}))],
        [DataSource("a", when_exhausted="stop")],
        0,
        4,
        8,
    )
    batches = list(_batches(TrainStream(stopping, _images(), _part(), 0.5), workers))
    assert len(batches) == 5
    assert sorted({i for _, i in _pairs(batches)}) == [i for i in range(20) if i != last]
    assert sum(batch["skipped"].item() for batch in batches) == 1


def test_the_hash_of_a_mixture_names_its_data_and_its_rules(tmp_path: Path) -> None:
    a, b = (
        _split(tmp_path / name, _make_split(tmp_path / name, sizes))
        for name, sizes in (("a", [20]), ("b", [7, 8]))
    )

    def hash_of(*sources: tuple[Split, float]) -> str:
        return TrainCorpus(
            [s for s, _ in sources], [DataSource(str(n), w) for n, (_, w) in enumerate(sources)], 0
        ).hash

    assert hash_of((a, 1.0)) == a.index.hash
    hashes = [
        hash_of((a, 1.0), (b, 1.0)),
        hash_of((a, 2.0), (b, 1.0)),
        hash_of((b, 1.0), (a, 1.0)),
        a.index.hash,
    ]
    assert len(set(hashes)) == len(hashes)
