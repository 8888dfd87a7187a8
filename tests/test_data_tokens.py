"""Token shards written by hand with webdataset's writer, read row by row and batch by batch."""

import copy
import io
import pickle
from collections.abc import Callable
from itertools import islice
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from webdataset.writer import TarWriter

from mhla_lightning.data.batching import Part
from mhla_lightning.data.corpus import Source, TrainCorpus
from mhla_lightning.data.index import ShardIndex, offsets_path, write_index
from mhla_lightning.data.kinds import Tokens
from mhla_lightning.data.modules.tokens import TokenDataModule
from mhla_lightning.data.split import Split
from mhla_lightning.data.stores import open_store
from mhla_lightning.data.stream import Batch, TrainStream
from mhla_lightning.data.tools.shards import describe_shard
from mhla_lightning.errors import DataError

LENGTH = 16
MEMBERS = [[5, 1, 7], [4], [3, 2]]  # rows of every member of every shard
ROWS = sum(map(sum, MEMBERS))
VOCABULARY = 500


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _arrays(dtype: str = "uint16", rows: int = ROWS, length: int = LENGTH, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and documents, (rows, length); beyond what fewer bytes hold where `dtype` has more."""
    rng, largest = np.random.default_rng(seed), 100_000 if dtype == "uint32" else VOCABULARY
    tokens = rng.integers(0, largest, (rows, length)).astype(dtype)
    return tokens, np.sort(rng.integers(0, 5, (rows, length)), axis=1).astype("uint16")


def _write(folder: Path, tokens: np.ndarray, documents: np.ndarray, members: list[list[int]] = MEMBERS) -> ShardIndex:
    folder.mkdir(parents=True)
    entries, first = [], 0
    for number, sizes in enumerate(members):
        path = folder / f"{number:03d}.tar"
        with open(path, "wb") as file, TarWriter(file, mtime=0, encoder=False, compress=False) as tar:
            for size in sizes:
                rows = slice(first, first + size)
                tar.write({"__key__": f"{first:04d}", "tokens.npy": _npy(tokens[rows])})
                tar.write({"__key__": f"{first:04d}", "documents.npy": _npy(documents[rows])})
                first += size
        entry, offsets = describe_shard(path, "tokens")
        np.save(offsets_path(folder, path.name), offsets, allow_pickle=False)
        entries.append(entry)
    index = ShardIndex("tokens", tuple(entries), tokenizer="random", length=tokens.shape[1])
    write_index(folder, index)
    return index


def _split(folder: Path, index: ShardIndex) -> Split:
    return Split(index, open_store(folder))


def _stream(folder: Path, index: ShardIndex, kind: Tokens, share: float = 0.5) -> TrainStream:
    corpus = TrainCorpus([_split(folder, index)], [Source(str(folder))], 0, 4, 8)
    return TrainStream(corpus, kind, Part(0, 1, 4, 4), share)


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
@pytest.mark.parametrize("wanted", [[0], [5], [12, 13], [21, 0, 13, 12, 5, 4, 0], list(range(ROWS))], ids=str)
def test_rows_are_what_was_written(tmp_path: Path, dtype: str, wanted: list[int]) -> None:
    tokens, documents = _arrays(dtype)
    kind, split = Tokens(LENGTH), _split(tmp_path / "train", _write(tmp_path / "train", tokens, documents))
    for _ in range(2):  # the second time the places of the members are known
        samples = kind.read(split, wanted)
        found = [kind.inspect(sample) for sample in samples]
        assert [sample["__index__"] for sample in samples] == wanted
        np.testing.assert_array_equal([row for row, _ in found], tokens[wanted])
        np.testing.assert_array_equal([row for _, row in found], documents[wanted])
        assert {row.dtype.name for row, _ in found} == {dtype}


def test_keys_name_shard_and_row(tmp_path: Path) -> None:
    split = _split(tmp_path / "train", _write(tmp_path / "train", *_arrays()))
    samples = Tokens(LENGTH).read(split, [0, 12, 13, 21])
    assert [(s["__key__"], Path(s["__url__"]).name) for s in samples] == [
        ("000.tar:0", "000.tar"),
        ("000.tar:12", "000.tar"),
        ("001.tar:0", "001.tar"),
        ("002.tar:4", "002.tar"),
    ]


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_a_batch_is_its_rows(tmp_path: Path, dtype: str) -> None:
    kind, split = Tokens(LENGTH), _split(tmp_path / "train", _write(tmp_path / "train", *_arrays(dtype)))
    samples = kind.read(split, [3, 20, 13, 3])
    together = kind.train_batch(samples, [0] * 4)
    assert together is not None
    for name, tensor in together.items():
        assert tensor.dtype == torch.int64
        assert torch.equal(tensor, torch.stack([kind.train(sample, 0)[name] for sample in samples]))


def test_a_batch_leaves_its_worker_whole_and_in_one_piece(tmp_path: Path) -> None:
    """Every tensor that is sent by itself costs more than reading some rows."""
    length = 2048
    index = _write(tmp_path / "train", *_arrays(length=length))
    batch: Batch = next(iter(_stream(tmp_path / "train", index, Tokens(length))))
    arrived: Batch = pickle.loads(ForkingPickler.dumps(batch))
    assert type(arrived) is dict
    assert list(arrived) == list(batch)
    for name, value in batch.items():
        same = torch.equal(value, arrived[name]) and value.dtype == arrived[name].dtype if isinstance(value, torch.Tensor) else value == arrived[name]
        assert same, name
    assert arrived["tokens"].is_shared()
    assert arrived["tokens"].untyped_storage().data_ptr() == arrived["documents"].untyped_storage().data_ptr()
    assert not arrived["index"].is_shared()
    arrived["index"] += 1  # writable like any other


def test_a_batch_in_half_precision_can_be_copied(tmp_path: Path) -> None:
    batch: Batch = next(iter(_stream(tmp_path / "train", _write(tmp_path / "train", *_arrays()), Tokens(LENGTH))))
    batch["weight"] = batch["weight"].bfloat16()
    copied = copy.deepcopy(batch)
    assert torch.equal(copied["weight"], batch["weight"])
    assert copied["tokens"].data_ptr() != batch["tokens"].data_ptr()


@pytest.mark.parametrize(("bad", "reason"), [("token", "outside the vocabulary of 500"), ("documents", "must not fall")])
def test_a_bad_row_is_skipped_and_counted(tmp_path: Path, bad: str, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    tokens, documents = _arrays()
    if bad == "token":
        tokens[6, 3] = VOCABULARY
    else:
        documents[6, 1], documents[6, 2] = 4, 0
    stream = _stream(tmp_path / "train", _write(tmp_path / "train", tokens, documents), Tokens(LENGTH, VOCABULARY))
    batches = list(islice(stream, ROWS))  # four epochs
    found = [index for batch in batches for index in batch["index"].tolist()]
    order = [place.index for place in stream.corpus.locate(np.arange(4 * ROWS + 1))]
    assert found == [order[n + 1] if order[n] == 6 else order[n] for n in range(4 * ROWS)], "the next row fills the slot"
    assert sum(batch["skipped"].item() for batch in batches) == 4
    np.testing.assert_array_equal(np.concatenate([batch["tokens"].numpy() for batch in batches]), tokens[found])
    assert reason in caplog.text
    assert "000.tar:6" in caplog.text


def test_no_row_within_the_vocabulary_ends_the_run(tmp_path: Path) -> None:
    index = _write(tmp_path / "train", *_arrays())
    with pytest.raises(DataError, match=r"\(100.0%\) cannot be decoded.*outside the vocabulary of 1\)"):
        next(iter(_stream(tmp_path / "train", index, Tokens(LENGTH, 1), 1.0)))


def _replace(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    """In the first member alone, at equal length."""
    assert len(old) == len(new)
    return lambda data: data.replace(old, new, 1)


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "floats": (_replace(b"<u2", b"<f2"), "member 0000.tokens.npy is float16"),
    "signed": (_replace(b"<u2", b"<i2"), "member 0000.tokens.npy is int16"),
    "big endian": (_replace(b"<u2", b">u2"), "member 0000.tokens.npy is >u2"),
    "objects": (_replace(b"<u2", b"|O "), "member 0000.tokens.npy is"),
    "columns first": (_replace(b"False", b"True "), "member 0000.tokens.npy is "),
    "other shape": (_replace(b"(5, 16)", b"(16, 5)"), "needs tokens.npy and documents.npy of equal shape"),
    "other size": (_replace(b"(5, 16)", b"(6, 16)"), r"member 0000.tokens.npy is uint16 \(6, 16\) in 288 bytes"),
    "one axis": (_replace(b"(5, 16)", b"( 80, )"), r"member 0000.tokens.npy is uint16 \(80,\)"),
    "no npy": (_replace(b"\x93NUMPY", b"\x93PANDA"), "member 0000.tokens.npy is no npy array"),
    "other names": (lambda data: data.replace(b"documents.npy", b"documents.txt"), "has no tar header|and has tokens.npy"),
    "foreign bytes": (lambda data: b"\x1f" * len(data), "has no tar header at byte 0"),
    "cut inside a member": (lambda data: data[:700], "ends at byte 700"),
    "cut between members": (lambda data: data[:1024], "ends at byte 1024"),
}


@pytest.mark.parametrize(("damage", "reason"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_told_in_one_sentence(tmp_path: Path, damage: Callable[[bytes], bytes], reason: str) -> None:
    index = _write(tmp_path / "train", *_arrays())
    path = tmp_path / "train" / "000.tar"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=reason) as error:
        Tokens(LENGTH).read(_split(tmp_path / "train", index), [0])
    assert "\n" not in str(error.value)
    assert "000.tar" in str(error.value)


def test_rows_of_another_length_are_refused(tmp_path: Path) -> None:
    split = _split(tmp_path / "train", _write(tmp_path / "train", *_arrays()))
    with pytest.raises(DataError, match=r"000\.tar: the tokens at byte 0 are \(5, 16\); \(5, 8\) are needed"):
        Tokens(8).read(split, [0])
    with pytest.raises(DataError, match="holds tokens of length 16; tokens of length 8 are needed"):
        Tokens(8).check(split.index, "x")


# The whole module


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    _write(folder / "train", *_arrays())
    _write(folder / "val", *_arrays(rows=6, seed=1), [[4, 2]])
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_the_module_reads_every_row_once_an_epoch(data: Path, workers: int) -> None:
    module = TokenDataModule(str(data), 4, num_workers=workers, vocabulary=VOCABULARY, seed=0)
    module.check(1)
    batches = list(islice(module.train_dataloader(), ROWS // 2))
    module.teardown("fit")
    tokens, documents = _arrays()
    rows = [index for batch in batches for index in batch["index"].tolist()]
    assert sorted(rows) == sorted([*range(ROWS)] * 2)
    for name, written in (("tokens", tokens), ("documents", documents)):
        assert {(batch[name].dtype, tuple(batch[name].shape)) for batch in batches} == {(torch.int64, (4, LENGTH))}
        np.testing.assert_array_equal(np.concatenate([batch[name].numpy() for batch in batches]), written[rows])


def test_the_module_validates_on_every_row_once(data: Path) -> None:
    module = TokenDataModule(str(data), 4, num_workers=2, seed=0)
    batches = list(module.val_dataloader())
    module.teardown("validate")
    assert [batch["weight"].tolist() for batch in batches] == [[1.0] * 4, [1.0, 1.0, 0.0, 0.0]]
    np.testing.assert_array_equal(np.concatenate([batch["tokens"].numpy() for batch in batches])[:6], _arrays(rows=6, seed=1)[0])


def test_the_module_tells_what_a_task_needs(data: Path) -> None:
    facts = TokenDataModule(str(data), 4, vocabulary=VOCABULARY).facts()
    assert facts == {"kind": "tokens", "length": LENGTH, "tokenizer": "random", "vocabulary": VOCABULARY}


def test_the_module_refuses_splits_that_differ(tmp_path: Path) -> None:
    _write(tmp_path / "train", *_arrays())
    _write(tmp_path / "val", *_arrays(rows=6, length=8), [[6]])
    with pytest.raises(DataError, match="holds tokens of length 8; tokens of length 16 are needed"):
        TokenDataModule(str(tmp_path), 4).check(1)
