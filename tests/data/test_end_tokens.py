"""A quoted end token in a text is text: of every kind of tokenizer, listed as special or not, whatever it
does with the blanks beside it; and the bytes are those of the text.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mhla_lightning.data.prepare.text.tokenize import TextOptions, tokenize
from mhla_lightning.data.prepare.text.train import END, train_tokenizer
from mhla_lightning.data.tokenizers import Tokenizer, open_tokenizer
from tests.helpers.errors import refused
from tests.helpers.texts import documents_of, read_rows

tokenizers = pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A byte-level BPE with <|endoftext|> as id 0."""
    folder = tmp_path_factory.mktemp("bpe")
    (folder / "text.txt").write_text(f"plain words, a quoted {END} and </s> here\n" * 20)
    train_tokenizer([str(folder / "text.txt")], folder / "tokenizer.json", 320)
    return dict(json.loads((folder / "tokenizer.json").read_text()))


def _sentencepiece(model: str, prepend: bool) -> dict[str, Any]:
    """A tokenizer as Llama's or T5's: </s> is a piece of the model, too."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "</", "s", ">", "ab"]
    if model == "Unigram":
        # Control symbols have the score 0, which is the best.
        scores = [0.0, 0.0, 0.0, *[-20.0] * 256, -2.0, -9.0, -8.0, -8.0, -3.0]
        core = tokenizers.Tokenizer(
            tokenizers.models.Unigram(list(zip(pieces, scores, strict=True)), 0, byte_fallback=True)
        )
    else:
        pieces += ["a", "b", "<", "/"]
        core = tokenizers.Tokenizer(
            tokenizers.models.BPE(
                vocab={piece: number for number, piece in enumerate(pieces)},
                merges=[("a", "b"), ("<", "/")],
                unk_token="<unk>",
                byte_fallback=True,
                ignore_merges=True,  # looks up whole words, as Llama 3 does
            )
        )
    replace = tokenizers.normalizers.Replace(" ", "▁")
    first = [tokenizers.normalizers.Prepend("▁")] if prepend else []
    core.normalizer = tokenizers.normalizers.Sequence([*first, replace])
    strip = [tokenizers.decoders.Strip(" ", 1, 0)] if prepend else []
    core.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            *strip,
        ]
    )
    core.add_special_tokens(["<unk>", "<s>", "</s>"])
    return dict(json.loads(core.to_str()))


FLAGS = [
    {},
    {"rstrip": True},
    {"lstrip": True, "rstrip": True},
    {"normalized": True},
    {"normalized": True, "rstrip": True, "lstrip": True},
    {"single_word": True},
]
KINDS = ["byte-level", "BPE", "BPE with a space", "Unigram", "Unigram with a space"]


def opened(kind: str, bpe: dict[str, Any], folder: Path, special: bool, flags: dict[str, bool]) -> Tokenizer:
    end = END if kind == "byte-level" else "</s>"
    described = (
        json.loads(json.dumps(bpe))
        if kind == "byte-level"
        else _sentencepiece(kind.split()[0], kind.endswith("space"))
    )
    for token in described["added_tokens"]:
        if token["content"] == end:
            token |= {"special": special, "normalized": False, **flags}
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(described))
    found = open_tokenizer(str(folder))
    assert found.end == (0 if kind == "byte-level" else 2)
    return found


@pytest.mark.parametrize("special", [True, False], ids=["special", "not special"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_quoted_end_token_is_text(kind: str, special: bool, bpe: dict[str, Any], tmp_path: Path) -> None:
    for number, flags in enumerate(FLAGS):
        found = opened(kind, bpe, tmp_path / str(number), special, flags)
        end = END if kind == "byte-level" else "</s>"
        for text in (f"ab {end}   ab", end, f"{end}{end}", f"a{end}b", f"  {end}\n\n ab", f"{end} ", "ab ab"):
            ids = found.encode(text)
            assert found.end not in ids, (flags, text)
            assert found.decode(ids) == text, (flags, text)
            counted = int(found.token_bytes[ids].sum())
            assert counted - len(text.encode()) == (1 if kind.endswith("space") else 0), (flags, text)
            assert found.encode_array(text).tolist() == ids
            assert found.encode_many([text, "ab"]) == [ids, found.encode("ab")]


def test_other_tokens_keep_the_blanks_beside_them(bpe: dict[str, Any], tmp_path: Path) -> None:
    """Added tokens that are no end stay one id, and swallow nothing."""
    described = json.loads(json.dumps(bpe))
    flags = {"single_word": False, "lstrip": True, "rstrip": True, "normalized": False, "special": False}
    number = len(described["model"]["vocab"])
    described["added_tokens"].append({"id": number, "content": "<tag>", **flags})
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    found, text = open_tokenizer(str(tmp_path)), "plain  <tag>   words <tag>"
    ids = found.encode(text)
    assert ids.count(number) == 2
    assert found.decode(ids) == text
    assert int(found.token_bytes[ids].sum()) == len(text)


def test_tokenizers_without_the_fault_are_used_as_they_are(bpe: dict[str, Any], tmp_path: Path) -> None:
    """The ids are those of the package itself."""
    (tmp_path / "tokenizer.json").write_text(json.dumps(bpe))
    core = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    core.encode_special_tokens = True
    for text in (f"plain words, {END}  and </s>", "naïve 日本語 🙂"):
        assert open_tokenizer(str(tmp_path)).encode(text) == core.encode(text, add_special_tokens=False).ids


def test_documents_of_shards_end_once(bpe: dict[str, Any], tmp_path: Path) -> None:
    """Rows of documents that quote the end: the id is at their ends alone, and bytes per token are right."""
    texts = [f"one {END}   two", END, "three"]
    (tmp_path / "in").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "in" / f"{number}.txt").write_text(text)
    found = opened("byte-level", bpe, tmp_path / "t", False, {"rstrip": True})
    options = TextOptions(str(tmp_path / "t"), length=64, val=1)
    report = tokenize([str(tmp_path / "in")], tmp_path / "out", options)
    assert sum(part.bytes for part in report.splits.values()) == sum(map(len, texts))
    pieces = [
        piece for split in ("train", "val") for piece in documents_of(*read_rows(tmp_path / "out", split, 64))
    ]
    assert [piece.count(0) for piece in pieces] == [1, 1, 1]
    assert sorted(found.decode(piece) for piece in pieces) == sorted(texts)
    assert sum(int(found.token_bytes[np.array(piece)].sum()) for piece in pieces) == sum(map(len, texts))


def test_an_end_that_is_the_only_way_to_write_a_text(bpe: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(bpe))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "q"}')
    found = open_tokenizer(str(tmp_path))
    assert found.decode(found.encode("plain words")) == "plain words"
    with refused("tokenizer") as error:
        found.encode("q")
    assert "'q'" in error.value.reason


def test_a_tokenizer_with_a_byte_order_mark(bpe: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(bpe), encoding="utf-8-sig")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}), encoding="utf-8-sig")
    assert open_tokenizer(str(tmp_path)).decode(open_tokenizer(str(tmp_path)).encode("plain")) == "plain"
