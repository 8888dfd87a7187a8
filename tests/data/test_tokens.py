"""Token shards written by hand with webdataset's writer, read row by row and batch by batch."""

import copy
import io
import pickle
from collections.abc import Callable
from itertools import islice
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from webdataset.writer import TarWriter

from mhla_lightning.config.recipes import apply_overrides
from mhla_lightning.data.batching import RankPart
from mhla_lightning.data.columns import PADDING
from mhla_lightning.data.corpus import DataSource, TrainCorpus
from mhla_lightning.data.index import ShardIndex, offsets_path, write_index
from mhla_lightning.data.kinds import Tokens
from mhla_lightning.data.modules.options import TextConfig
from mhla_lightning.data.modules.tokens import TokenDataModule
from mhla_lightning.data.prepare.pack import pack
from mhla_lightning.data.prepare.shards import describe_shard
from mhla_lightning.data.prepare.sources import mqar
from mhla_lightning.data.skips import BadSample
from mhla_lightning.data.split import Split
from mhla_lightning.data.stores import open_store
from mhla_lightning.data.stream import Batch, TrainStream
from mhla_lightning.errors import DataError
from tests.helpers.data_modules import build
from tests.helpers.errors import refused

LENGTH = 16
MEMBERS = [[5, 1, 7], [4], [3, 2]]  # rows of every member of every shard
ROWS = sum(map(sum, MEMBERS))
VOCABULARY = 500


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _arrays(
    dtype: str = "uint16", rows: int = ROWS, length: int = LENGTH, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and documents, (rows, length); beyond what fewer bytes hold where `dtype` has more."""
    rng, largest = np.random.default_rng(seed), 100_000 if dtype == "uint32" else VOCABULARY
    tokens = rng.integers(0, largest, (rows, length)).astype(dtype)
    return tokens, np.sort(rng.integers(0, 5, (rows, length)), axis=1).astype("uint16")


def _write(
    folder: Path, tokens: np.ndarray, documents: np.ndarray, members: list[list[int]] = MEMBERS
) -> ShardIndex:
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
    corpus = TrainCorpus([_split(folder, index)], [DataSource(str(folder))], 0, 4, 8)
    return TrainStream(corpus, kind, RankPart(0, 1, 4, 4), share)


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
        same = (
            torch.equal(value, arrived[name]) and value.dtype == arrived[name].dtype
            if isinstance(value, torch.Tensor)
            else value == arrived[name]
        )
        assert same, name
    assert arrived["tokens"].is_shared()
    assert arrived["tokens"].untyped_storage().data_ptr() == arrived["documents"].untyped_storage().data_ptr()
    assert not arrived["index"].is_shared()
    arrived["index"] += 1  # writable like any other


def test_a_batch_in_half_precision_can_be_copied(tmp_path: Path) -> None:
    batch: Batch = next(
        iter(_stream(tmp_path / "train", _write(tmp_path / "train", *_arrays()), Tokens(LENGTH)))
    )
    batch["weight"] = batch["weight"].bfloat16()
    copied = copy.deepcopy(batch)
    assert torch.equal(copied["weight"], batch["weight"])
    assert copied["tokens"].data_ptr() != batch["tokens"].data_ptr()


@pytest.mark.parametrize(
    ("bad", "reason"), [("token", "outside the vocabulary of 500"), ("documents", "must not fall")]
)
def test_a_bad_row_is_skipped_and_counted(
    tmp_path: Path, bad: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    tokens, documents = _arrays()
    if bad == "token":
        tokens[6, 3] = VOCABULARY
    else:
        documents[6, 1], documents[6, 2] = 4, 0
    stream = _stream(
        tmp_path / "train", _write(tmp_path / "train", tokens, documents), Tokens(LENGTH, VOCABULARY)
    )
    batches = list(islice(stream, ROWS))  # four epochs
    found = [index for batch in batches for index in batch["index"].tolist()]
    order = [place.index for place in stream.corpus.locate(np.arange(4 * ROWS + 1))]
    assert found == [order[n + 1] if order[n] == 6 else order[n] for n in range(4 * ROWS)], (
        "the next row fills the slot"
    )
    assert sum(batch["skipped"].item() for batch in batches) == 4
    np.testing.assert_array_equal(
        np.concatenate([batch["tokens"].numpy() for batch in batches]), tokens[found]
    )
    assert reason in caplog.text
    assert "000.tar:6" in caplog.text


def test_no_row_within_the_vocabulary_ends_the_run(tmp_path: Path) -> None:
    index = _write(tmp_path / "train", *_arrays())
    with refused(str(tmp_path / "train" / "001.tar"), DataError):
        next(iter(_stream(tmp_path / "train", index, Tokens(LENGTH, 1), 1.0)))


def _replace(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    """In the first member alone, at equal length."""
    assert len(old) == len(new)
    return lambda data: data.replace(old, new, 1)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "floats": _replace(b"<u2", b"<f2"),
    "signed": _replace(b"<u2", b"<i2"),
    "big endian": _replace(b"<u2", b">u2"),
    "objects": _replace(b"<u2", b"|O "),
    "columns first": _replace(b"False", b"True "),
    "other shape": _replace(b"(5, 16)", b"(16, 5)"),
    "other size": _replace(b"(5, 16)", b"(6, 16)"),
    "one axis": _replace(b"(5, 16)", b"( 80, )"),
    "no npy": _replace(b"\x93NUMPY", b"\x93PANDA"),
    "other names": lambda data: data.replace(b"documents.npy", b"documents.txt"),
    "foreign bytes": lambda data: b"\x1f" * len(data),
    "cut inside a member": lambda data: data[:700],
    "cut between members": lambda data: data[:1024],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damage_is_refused(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    index = _write(tmp_path / "train", *_arrays())
    path = tmp_path / "train" / "000.tar"
    path.write_bytes(damage(path.read_bytes()))
    with refused(str(path), DataError) as error:
        Tokens(LENGTH).read(_split(tmp_path / "train", index), [0])
    assert "\n" not in str(error.value)


def test_rows_of_another_length_are_refused(tmp_path: Path) -> None:
    split = _split(tmp_path / "train", _write(tmp_path / "train", *_arrays()))
    with refused(str(tmp_path / "train" / "000.tar"), DataError):
        Tokens(8).read(split, [0])
    with refused("x", DataError):
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
    module = build(
        TokenDataModule,
        path=str(data),
        batch_size=4,
        num_workers=workers,
        vocabulary=VOCABULARY,
        seed=0,
    )
    module.check(1)
    batches = list(islice(module.train_dataloader(), ROWS // 2))
    module.teardown("fit")
    tokens, documents = _arrays()
    rows = [index for batch in batches for index in batch["index"].tolist()]
    assert sorted(rows) == sorted([*range(ROWS)] * 2)
    for name, written in (("tokens", tokens), ("documents", documents)):
        assert {(batch[name].dtype, tuple(batch[name].shape)) for batch in batches} == {
            (torch.int64, (4, LENGTH))
        }
        np.testing.assert_array_equal(
            np.concatenate([batch[name].numpy() for batch in batches]), written[rows]
        )


def test_the_module_validates_on_every_row_once(data: Path) -> None:
    module = build(TokenDataModule, path=str(data), batch_size=4, num_workers=2, seed=0)
    batches = list(module.val_dataloader())
    module.teardown("validate")
    assert [batch["weight"].tolist() for batch in batches] == [[1.0] * 4, [1.0, 1.0, 0.0, 0.0]]
    np.testing.assert_array_equal(
        np.concatenate([batch["tokens"].numpy() for batch in batches])[:6], _arrays(rows=6, seed=1)[0]
    )


def test_the_module_tells_what_a_task_needs(data: Path) -> None:
    facts = TokenDataModule(str(data), 4, vocabulary=VOCABULARY).facts()
    known = {"kind": "tokens", "length": LENGTH, "val_length": LENGTH, "tokenizer": "random"}
    assert facts == {**known, "vocabulary": VOCABULARY, "token_bytes": None}
    assert TokenDataModule(str(data), 4).facts()["vocabulary"] is None


def test_rows_of_val_may_have_another_length(tmp_path: Path) -> None:
    _write(tmp_path / "train", *_arrays())
    _write(tmp_path / "val", *_arrays(rows=6, length=8), [[6]])
    module = build(TokenDataModule, path=str(tmp_path), batch_size=4, num_workers=0, vocabulary=VOCABULARY)
    module.check(1)
    assert (module.facts()["length"], module.facts()["val_length"]) == (LENGTH, 8)
    assert next(iter(module.train_dataloader()))["tokens"].shape == (4, LENGTH)
    batches = list(module.val_dataloader())
    assert [tuple(batch["documents"].shape) for batch in batches] == [(4, 8), (4, 8)], (
        "slots without a row too"
    )
    np.testing.assert_array_equal(
        np.concatenate([batch["tokens"].numpy() for batch in batches])[:6], _arrays(rows=6, length=8)[0]
    )


def test_train_rows_of_a_mixture_have_one_length(tmp_path: Path) -> None:
    for name, length in (("a", 16), ("b", 8)):
        for split in ("train", "val"):
            _write(tmp_path / name / split, *_arrays(length=length))
    with refused(str(tmp_path / "b" / "train" / "index.json"), DataError):
        TokenDataModule(
            None, 4, mix=[DataSource(str(tmp_path / "a")), DataSource(str(tmp_path / "b"))]
        ).check(1)


# Padding


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_padding_is_document_minus_one(tmp_path: Path, dtype: str) -> None:
    tokens, documents = _arrays()
    padded = {3: 5, 7: 15, 12: 1}  # rows, and their places without text
    for row, places in padded.items():
        tokens[row, LENGTH - places :], documents[row, LENGTH - places :] = 0, PADDING
    kind, split = (
        Tokens(LENGTH),
        _split(tmp_path / "train", _write(tmp_path / "train", tokens, documents.astype(dtype))),
    )
    samples = kind.read(split, range(ROWS))
    together = kind.train_batch(samples, [0] * ROWS)
    wanted = np.where(documents == PADDING, -1, documents.astype(np.int64))
    assert (wanted == -1).sum() == sum(padded.values())
    assert together is not None
    np.testing.assert_array_equal(together["documents"].numpy(), wanted)
    np.testing.assert_array_equal(together["tokens"].numpy(), tokens)
    for row, sample in enumerate(samples):
        np.testing.assert_array_equal(kind.evaluate(sample)["documents"].numpy(), wanted[row])
        np.testing.assert_array_equal(kind.inspect(sample)[1], documents[row])


def test_document_numbers_above_padding_are_refused(tmp_path: Path) -> None:
    tokens, documents = _arrays()
    documents = documents.astype("uint32")
    documents[4, -1] = PADDING + 1
    kind, split = Tokens(LENGTH), _split(tmp_path / "train", _write(tmp_path / "train", tokens, documents))
    samples = kind.read(split, [4, 5])
    assert kind.train_batch(samples, [0, 0]) is None, "row by row the bad one is found"
    with pytest.raises(BadSample, match="document number 65536 is above 65535"):
        kind.inspect(samples[0])


# Sources


def _text(root: Path) -> Path:
    for number in range(40):
        (root / "in").mkdir(exist_ok=True)
        (root / "in" / f"{number:02d}.txt").write_text(f"text number {number} " * (number + 1))
    return root / "in"


def test_a_source_of_text_is_tokenized_once(tmp_path: Path) -> None:
    def module(**options: Any) -> TokenDataModule:
        return build(
            TokenDataModule,
            path=str(tmp_path / "to"),
            batch_size=4,
            num_workers=0,
            source=str(_text(tmp_path)),
            **{"length": 64, "val_length": 32, "val": 5, **options},
        )

    first = module()
    assert not first.is_ready()
    first.prepare_data()
    first.check(1)
    facts = first.facts()
    assert (facts["length"], facts["val_length"], facts["tokenizer"], facts["vocabulary"]) == (
        64,
        32,
        "bytes",
        257,
    )
    np.testing.assert_array_equal(facts["token_bytes"], [1] * 256 + [0])
    assert next(iter(first.train_dataloader()))["tokens"].shape == (4, 64)
    assert next(iter(first.val_dataloader()))["tokens"].shape == (4, 32)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "to").rglob("*")}
    again = module()
    again.prepare_data()
    again.check(1)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "to").rglob("*")} == times
    assert again.data_hash == first.data_hash
    for options, key in (
        ({"length": 128}, "text.length"),
        ({"length": None}, "text.length"),
        ({"val_length": None}, "text.val_length"),
        ({"tokenizer": "gpt2"}, "text.tokenizer"),
    ):
        with refused(key):
            module(**options).check(1)
    for tokenizer in (None, "bytes"):
        # without a source the index decides
        TokenDataModule(str(tmp_path / "to"), 4, text=TextConfig(tokenizer, 999)).check(1)
    with refused("text.tokenizer"):
        TokenDataModule(str(tmp_path / "to"), 4, text=TextConfig("gpt2")).check(1)


def test_another_path_leaves_out_what_made_the_recipe_s_own() -> None:
    recipe = {
        "data": {
            "class_path": "mhla_lightning.data.TokenDataModule",
            "init_args": {
                "path": "a",
                "source": "stdlib",
                "text": {"tokenizer": "bytes", "length": 8},
            },
        }
    }
    text = {"tokenizer": None, "length": 8}
    assert apply_overrides(recipe, {"data.path": "b"})["data"]["init_args"] == {
        "path": "b",
        "source": None,
        "text": text,
    }
    named = apply_overrides(recipe, {"data.path": "b", "data.text.tokenizer": "x.json"})
    assert named["data"]["init_args"]["text"] == {**text, "tokenizer": "x.json"}
    longer = apply_overrides(recipe, {"data.text.length": 9})["data"]["init_args"]
    assert longer["text"] == {"tokenizer": "bytes", "length": 9}


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"packing": "first-fit"}, "text.packing"),
        ({"length": 1}, "text.length"),
        ({"source": "mqar:65"}, "source"),
        ({"source": "mqar:x"}, "source"),
        ({"source": "mqar", "length": 63}, "text.length"),
        ({"source": "mqar", "val": 0.5}, "text.val"),
        ({"path": None, "mix": [DataSource("x")]}, "source"),
        ({"path": "s3://bucket/x"}, "source"),
    ],
    ids=str,
)
def test_options_of_a_source_are_checked_at_once(options: dict[str, Any], key: str) -> None:
    with refused(key):
        build(TokenDataModule, **{"path": "x", "source": "stdlib", **options})


@pytest.mark.parametrize(
    ("spec", "pairs", "length"), [("mqar", 16, 128), ("mqar:4", 4, 16), ("mqar:1", 1, 9)]
)
def test_mqar_rows_ask_for_every_pair_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, pairs: int, length: int
) -> None:
    monkeypatch.setitem(mqar.ROWS, "train", 300)
    module = build(
        TokenDataModule,
        path=str(tmp_path / "to"),
        batch_size=100,
        num_workers=0,
        source=spec,
        length=length,
        val_length=length + 20,
        val=50,
    )
    module.prepare_data()
    module.check(1)
    assert module.facts() == {
        "kind": "tokens",
        "length": length,
        "val_length": length + 20,
        "tokenizer": "mqar",
        "vocabulary": 128,
        "token_bytes": None,
    }
    train, val = list(islice(module.train_dataloader(), 3)), list(module.val_dataloader())
    rows = [*np.concatenate([batch["tokens"].numpy() for batch in train]), *val[0]["tokens"].numpy()[:50]]
    assert len({row.tobytes() for row in rows}) > 340, "rows differ, and train and val too"
    assert (train[0]["documents"] == 0).all()
    places = set()
    for row in rows:
        keys, values = row[0 : 2 * pairs : 2], row[1 : 2 * pairs : 2]
        assert len(set(keys)) == pairs
        assert keys.max() < 64 <= values.min()
        queries = 2 * pairs + np.flatnonzero(row[2 * pairs :] < 64)
        assert sorted(row[queries]) == sorted(keys), "every key once more, and no other"
        answer = dict(zip(keys, values, strict=True))
        assert [answer[key] for key in row[queries]] == row[queries + 1].tolist()
        places |= set(queries.tolist())
    assert {2 * pairs, length - 2} <= places, "from right after the pairs to the end"


def test_mqar_is_a_function_of_its_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {name: len(part) for name, part in mqar.open_mqar().parts.items()} == {
        "train": 20_000,
        "val": 1_000,
    }
    monkeypatch.setitem(mqar.ROWS, "train", 40)
    hashes = [
        pack(mqar.open_mqar("mqar:3", 16, val=9, seed=seed), tmp_path / str(n))["train"].hash
        for n, seed in enumerate((0, 0, 1))
    ]
    assert hashes[0] == hashes[1] != hashes[2]
    monkeypatch.setitem(mqar.ROWS, "val", 9)
    assert pack("mqar", tmp_path / "named")["train"].length == 128
