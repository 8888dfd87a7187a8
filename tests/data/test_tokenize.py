"""Text to token shards: every token once, and the same bytes however it was made."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from mhla_lightning.cli.main import main
from mhla_lightning.data.columns import PADDING
from mhla_lightning.data.index import read_index
from mhla_lightning.data.modules.options import ReadingConfig
from mhla_lightning.data.modules.tokens import TokenDataModule
from mhla_lightning.data.prepare.preview import preview
from mhla_lightning.data.prepare.text import chunks
from mhla_lightning.data.prepare.text.layout import Layout, best_fit, concatenate, held_out, lay_out
from mhla_lightning.data.prepare.text.tokenize import TextOptions, tokenize
from mhla_lightning.data.prepare.text.train import train_tokenizer
from mhla_lightning.data.prepare.verify import verify
from mhla_lightning.data.tokenizers import open_tokenizer, tokenizer_of
from mhla_lightning.errors import DataError, UserError
from tests.helpers.errors import refused
from tests.helpers.ranks import Nursery
from tests.helpers.texts import documents_of, read_rows, text_folder, texts_of_all_lengths

pytest.importorskip("tokenizers")
END = 256


def _bytes(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _split_texts(texts: list[str], val: int | float, seed: int) -> dict[str, list[list[int]]]:
    chosen = held_out(len(texts), val, seed)
    encoded = [[*text.encode(), END] for text in texts]
    return {
        name: [ids for ids, is_val in zip(encoded, chosen, strict=True) if is_val == (name == "val")]
        for name in ("train", "val")
    }


# Every token exactly once


@pytest.mark.parametrize("seed", range(3))
def test_best_fit_holds_every_piece_once(tmp_path: Path, seed: int) -> None:
    texts = texts_of_all_lengths(60, 150, seed)
    report = tokenize(
        [str(text_folder(tmp_path / "in", texts))],
        tmp_path / "out",
        TextOptions(length=64, val_length=48, val=0.2, seed=seed),
    )
    for split, documents in _split_texts(texts, 0.2, seed).items():
        length = 48 if split == "val" else 64
        tokens, owners = read_rows(tmp_path / "out", split, 64, 48)
        wanted = [
            tuple(ids[start : start + length]) for ids in documents for start in range(0, len(ids), length)
        ]
        assert sorted(documents_of(tokens, owners)) == sorted(wanted)
        found = report.splits[split]
        assert (found.documents, found.tokens) == (len(documents), sum(map(len, documents)))
        assert found.bytes == found.tokens - found.documents
        assert found.dropped == 0
        assert found.padding == pytest.approx((owners < 0).mean())
        assert 0 < found.padding < 0.2, "short documents share rows"


@pytest.mark.parametrize("seed", range(3))
def test_concatenation_holds_every_token_once(tmp_path: Path, seed: int) -> None:
    texts = texts_of_all_lengths(60, 150, seed)
    options = TextOptions(length=64, val=12, seed=seed, packing="concatenate")
    report = tokenize([str(text_folder(tmp_path / "in", texts))], tmp_path / "out", options)
    for split, documents in _split_texts(texts, 12, seed).items():
        tokens, owners = read_rows(tmp_path / "out", split, 64)
        stream = sum(documents, [])
        wanted = [tuple(stream[start : start + 64]) for start in range(0, len(stream) - 63, 64)]
        assert sorted(map(tuple, tokens.tolist())) == sorted(wanted)
        assert report.splits[split].dropped == len(stream) % 64
        assert report.splits[split].padding == 0
        assert (owners >= 0).all()
        starts = np.array([0, *np.flatnonzero(np.array(stream) == END) + 1])  # of documents in the stream
        numbers = {
            row: np.searchsorted(starts, 64 * place + np.arange(64), side="right")
            for place, row in enumerate(wanted)
        }
        for row, owner in zip(map(tuple, tokens.tolist()), owners, strict=True):
            np.testing.assert_array_equal(owner, numbers[row] - numbers[row][0])


@pytest.mark.parametrize("packing", ["best-fit", "concatenate"])
@pytest.mark.parametrize("row", [2, 7, 32, 1000])
@pytest.mark.parametrize("seed", range(4))
def test_a_layout_covers_the_corpus_once(packing: str, row: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 3 * row, 200) if seed else np.full(200, row)
    keep = rng.random(200) < 0.7  # the documents of a split, with those of the other between them
    starts, total = (np.cumsum(lengths) - lengths)[keep], int(lengths[keep].sum())
    layout = lay_out(packing, starts, lengths[keep], row)
    covered = np.concatenate(
        [np.arange(start, start + size) for start, size in zip(layout.starts, layout.lengths, strict=True)]
    )
    corpus = np.concatenate(
        [np.arange(start, start + size) for start, size in zip(starts, lengths[keep], strict=True)]
    )
    if packing == "best-fit":
        assert layout.dropped == 0
        np.testing.assert_array_equal(np.sort(covered), corpus)
    else:
        assert layout.dropped == total % row
        np.testing.assert_array_equal(covered, corpus[: total - layout.dropped])
    used = np.add.reduceat(layout.lengths, layout.rows[:-1])
    assert layout.rows[0] == 0
    assert layout.rows[-1] == len(layout.lengths)
    assert (np.diff(layout.rows) > 0).all()
    assert used.max() <= row
    assert layout.lengths.min() > 0
    if packing == "concatenate":
        assert (used == row).all()
    else:
        assert np.sort(used)[:2].sum() > row or len(used) == 1, "no two rows would fit into one"


def test_best_fit_leaves_the_least_room() -> None:
    lengths = np.array([4, 7, 3, 10, 25, 6])
    layout = best_fit(np.cumsum(lengths) - lengths, lengths, 10)
    rows = [
        layout.lengths[first:stop].tolist() for first, stop in zip(layout.rows, layout.rows[1:], strict=False)
    ]
    assert rows == [[10], [10], [10], [7, 3], [4, 6], [5]]


def test_concatenation_of_nothing_that_fills_a_row() -> None:
    layout: Layout = concatenate(np.array([0, 3]), np.array([3, 3]), 10)
    assert (layout.starts.tolist(), layout.rows.tolist(), layout.dropped) == ([], [0], 6)


def test_a_row_of_too_many_documents_is_refused() -> None:
    sizes = np.ones(PADDING + 1, dtype=np.int64)
    with refused("length", DataError):
        lay_out("best-fit", np.arange(PADDING + 1), sizes, PADDING + 1)
    assert len(lay_out("best-fit", np.arange(PADDING), sizes[:-1], PADDING + 1).rows) == 2


def test_documents_are_held_out_by_seed_and_number() -> None:
    chosen = held_out(1000, 0.1, 0)
    assert chosen.sum() == 100
    assert held_out(1000, 17, 0).sum() == 17
    np.testing.assert_array_equal(chosen, held_out(1000, 100, 0))
    assert (chosen & held_out(1000, 0.1, 1)).sum() < 40, "another seed, others"
    assert abs(np.flatnonzero(chosen).mean() - 500) < 120, "from everywhere"
    assert (held_out(1000, 17, 0) <= chosen).all()
    assert held_out(3, 0.01, 0).sum() == 1
    assert hashlib.sha256(np.packbits(chosen).tobytes()).hexdigest()[:16] == PINNED, (
        "a change would move documents from train to val"
    )


PINNED = "d9c10567d0253ac8"


# Bytes per token, files, names


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bpe")
    (folder / "text.txt").write_text("words of a text, and more words of it: éé 日本\n" * 50)
    train_tokenizer([str(folder / "text.txt")], folder / "mine.json", 300)
    return folder / "mine.json"


def test_a_bpe_is_kept_beside_the_splits(tmp_path: Path, bpe: Path) -> None:
    texts = [f"words of text {number}, and more words 日本 🙂\n" * (number % 7 + 1) for number in range(40)]
    report = tokenize(
        [str(text_folder(tmp_path / "in", texts))], tmp_path / "out", TextOptions(str(bpe), length=32, val=4)
    )
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "tokenizer.json",
        "tokenizer_config.json",
        "train",
        "val",
    ]
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == bpe.read_bytes()
    index = read_index(tmp_path / "out" / "train")
    assert index.tokenizer == f"tokenizer.json sha256:{hashlib.sha256(bpe.read_bytes()).hexdigest()[:16]}"
    tokenizer = tokenizer_of(tmp_path / "out", index)
    pieces: list[tuple[int, ...]] = []
    for split in ("train", "val"):
        tokens, owners = read_rows(tmp_path / "out", split, 32)
        assert tokenizer.token_bytes[tokens[owners >= 0]].sum() == report.splits[split].bytes, (
            "bits per byte divide by these"
        )
        pieces += documents_of(tokens, owners)
    encoded = [[*tokenizer.encode(text), tokenizer.end] for text in texts]
    assert sorted(pieces) == sorted(
        tuple(ids[start : start + 32]) for ids in encoded for start in range(0, len(ids), 32)
    )
    total = sum(len(text.encode()) for text in texts)
    assert sum(part.bytes for part in report.splits.values()) == total
    assert total / sum(part.tokens for part in report.splits.values()) > 2, "bytes a token"


def test_facts_and_the_copy_for_a_run(tmp_path: Path, bpe: Path) -> None:
    tokenize(
        [str(text_folder(tmp_path / "in", texts_of_all_lengths(20, 90)))],
        tmp_path / "out",
        TextOptions(str(bpe), length=32, val_length=16, val=4),
    )
    data, tokenizer = TokenDataModule(str(tmp_path / "out"), 2), open_tokenizer(str(bpe))
    facts = data.facts()
    np.testing.assert_array_equal(facts.pop("token_bytes"), tokenizer.token_bytes)
    assert facts == {
        "kind": "tokens",
        "length": 32,
        "val_length": 16,
        "tokenizer": tokenizer.name,
        "vocabulary": tokenizer.vocabulary,
    }
    assert data.kind(data.index()).vocabulary == tokenizer.vocabulary
    assert TokenDataModule(str(tmp_path / "out"), 2, vocabulary=999).facts()["vocabulary"] == 999
    (tmp_path / "run").mkdir()
    data.save_tokenizer(tmp_path / "run")
    assert open_tokenizer(str(tmp_path / "run")).name == tokenizer.name
    with pytest.raises(UserError, match=r"no/tokenizer.json"):
        data.save_tokenizer(tmp_path / "no")


def test_without_its_tokenizer_data_is_read_all_the_same(
    tmp_path: Path, bpe: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenize(
        [str(text_folder(tmp_path / "in", texts_of_all_lengths(20, 90)))],
        tmp_path / "out",
        TextOptions(str(bpe), length=32, val=4),
    )
    (tmp_path / "out" / "tokenizer.json").unlink()
    data = TokenDataModule(str(tmp_path / "out"), 2, reading=ReadingConfig(num_workers=0))
    data.check(1)
    assert (data.facts()["token_bytes"], data.facts()["vocabulary"]) == (None, None)
    assert next(iter(data.train_dataloader()))["tokens"].shape == (2, 32)
    assert caplog.text.count("put its tokenizer.json beside train/") == 1


# The same bytes, however they were made


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory, bpe: Path) -> Path:
    """6 MB of text, which takes long enough to be killed, and its shards as one process makes them in one
    go.
    """
    root = tmp_path_factory.mktemp("large")
    rng = np.random.default_rng(0)
    words = np.array(
        ["".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), size)) for size in rng.integers(2, 9, 3000)]
    )
    lines = [json.dumps({"text": " ".join(rng.choice(words, size))}) for size in rng.integers(1, 400, 5000)]
    (root / "text.jsonl").write_text("\n".join(lines))
    tokenize([str(root / "text.jsonl")], root / "alone", TextOptions(str(bpe), length=128, shards=50))
    return root


@pytest.mark.slow
def test_two_workers_write_the_same_bytes(large: Path, bpe: Path, tmp_path: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    options = TextOptions(str(bpe), length=128, shards=50)
    tokenize(
        [str(large / "text.jsonl")],
        tmp_path / "to",
        options,
        workers=2,
        on_progress=lambda *step: steps.append(step),
    )
    assert _bytes(tmp_path / "to") == _bytes(large / "alone")
    size = (large / "text.jsonl").stat().st_size
    assert [step for step in steps if step[0] == "tokenize"][-1] == ("tokenize", size, size)
    assert len({step for step in steps if step[0] == "tokenize"}) > 4
    assert [path.name for path in tmp_path.iterdir()] == ["to"]


@pytest.mark.parametrize(
    ("finished", "many"),
    [("tokens/0*.json", 2), pytest.param("entries/train/*.json", 3, marks=pytest.mark.slow)],
    ids=["tokenizing", "writing shards"],
)
@pytest.mark.slow
def test_killed_and_continued_gives_the_same_bytes(
    large: Path, bpe: Path, tmp_path: Path, nursery: Nursery, finished: str, many: int
) -> None:
    target, hidden = tmp_path / "to", tmp_path / ".to.packing"
    command = ["data", "tokenize", str(large / "text.jsonl"), "--to", str(target), "--workers", "2"]
    command += ["--tokenizer", str(bpe), "--length", "128", "--shards", "50"]
    nursery.start(1, command, large).kill_when(lambda: len(list(hidden.glob(finished))) >= many)
    assert [path.name for path in tmp_path.iterdir()] == [".to.packing"]
    made = {path: path.stat().st_mtime_ns for path in hidden.glob("tokens/0*.npy")}
    chunk_count = len(list(hidden.glob("tokens/0*.json")))
    notes: list[str] = []
    report = tokenize(
        [str(large / "text.jsonl")],
        target,
        TextOptions(str(bpe), length=128, shards=50),
        on_note=notes.append,
    )
    assert made
    assert f"{chunk_count} chunks were tokenized before and are kept" in notes
    assert report.made < sum(part.tokens for part in report.splits.values())
    assert _bytes(target) == _bytes(large / "alone")
    assert [path.name for path in tmp_path.iterdir()] == ["to"]


@pytest.mark.slow
def test_other_options_are_not_continued(large: Path, bpe: Path, tmp_path: Path) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if what == "train":
            raise KeyboardInterrupt

    notes: list[str] = []
    source = [str(large / "text.jsonl")]
    with pytest.raises(KeyboardInterrupt):
        tokenize(source, tmp_path / "to", TextOptions(length=64), on_progress=stop, on_note=notes.append)
    tokenize(source, tmp_path / "to", TextOptions(str(bpe), length=128, shards=50), on_note=notes.append)
    assert [note.rpartition("; ")[2] for note in notes] == [
        "the same command continues with them",
        "starting anew",
    ]
    assert _bytes(tmp_path / "to") == _bytes(large / "alone")


def test_a_corpus_is_made_anew_in_one_process(tmp_path: Path, bpe: Path) -> None:
    """Nothing of the first is taken for the second: neither chunks nor tokenizer."""
    source = [str(text_folder(tmp_path / "in", texts_of_all_lengths(30, 200)))]
    tokenize(source, tmp_path / "to", TextOptions(str(bpe), length=32))
    tokenize(source, tmp_path / "to", TextOptions(length=64), overwrite=True)
    tokenize(source, tmp_path / "fresh", TextOptions(length=64))
    assert _bytes(tmp_path / "to") == _bytes(tmp_path / "fresh")
    assert sorted(path.name for path in (tmp_path / "to").iterdir()) == ["train", "val"]


def test_long_documents_are_encoded_in_stretches(
    tmp_path: Path, bpe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "_STRETCH", 50)
    texts = ["a line of text\n" * 30, "nolines" * 40, "short"]
    assert ["".join(chunks._stretches(text)) for text in texts] == texts
    assert max(len(part) for text in texts for part in chunks._stretches(text)) <= 50
    assert {part[0] for part in list(chunks._stretches(texts[0]))[1:]} == {"\n"}
    report = tokenize(
        [str(text_folder(tmp_path / "in", texts))], tmp_path / "out", TextOptions(str(bpe), length=512, val=1)
    )
    tokenizer = open_tokenizer(str(bpe))
    found = [
        tokenizer.decode(piece)
        for split in ("train", "val")
        for piece in documents_of(*read_rows(tmp_path / "out", split, 512))
    ]
    assert sorted(found) == sorted(texts)
    assert sum(part.bytes for part in report.splits.values()) == sum(map(len, texts))


# The commands


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = text_folder(tmp_path / "in", texts_of_all_lengths(30, 150))
    (source / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\x00\xff")
    table = tmp_path / "table.json"
    words = [
        "--length",
        "64",
        "--val",
        "0.2",
        "--packing",
        "concatenate",
        "--json",
        str(table),
        "--workers",
        "1",
    ]
    assert main(["data", "tokenize", str(source), "--to", str(tmp_path / "out"), *words]) == 0
    shown = capsys.readouterr().out
    found = json.loads(table.read_text())
    train, val = found["rows"]
    assert (train["split"], train["documents"], val["documents"], train["tokenizer"]) == (
        "train",
        24,
        6,
        "bytes",
    )
    assert (
        train["rows"]
        == (train["tokens"] - train["dropped"]) / 64
        == read_index(tmp_path / "out" / "train").samples
    )
    assert (train["padding"], val["padding"]) == (0, 0)
    assert train["bytes_per_token"] == pytest.approx((train["tokens"] - 24) / train["tokens"])
    assert train["tokens_per_second"] > 1000
    assert found["summary"]["binary"] == 1
    for text in (
        f"{train['tokens']:,}",
        f"{val['rows']:,}",
        "left out: 1 binary file",
        f"{train['dropped']} tokens of train",
    ):
        assert text in shown


def test_padding_is_verified_and_shown(tmp_path: Path, bpe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [f"words of text {number}" for number in range(9)]
    for name, tokenizer in (("bytes", "bytes"), ("bpe", str(bpe))):
        tokenize(
            [str(text_folder(tmp_path / f"{name}-in", texts))],
            tmp_path / name,
            TextOptions(tokenizer, length=40, val_length=36, val=1),
        )
        assert verify(str(tmp_path / name)).found == 0
        for path in (tmp_path / name, tmp_path / name / "val"):
            (shown,) = preview(str(path), None if path.name == "val" else "val").texts
            assert "row 0: 36 tokens of 1 documents" in shown
            assert "words of text" in shown
            assert f"<{END if name == 'bytes' else 0}>" in shown
            assert "\n  padding (" in shown
            assert "65535" not in shown
