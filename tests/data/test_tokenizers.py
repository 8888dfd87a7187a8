"""Text to ids and back: bytes, byte-level BPE, what sentencepiece makes, text that is still arriving, and
training a tokenizer.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mhla_lightning.cli.main import main
from mhla_lightning.data.index import ShardIndex
from mhla_lightning.data.prepare.text.train import END, train_tokenizer
from mhla_lightning.data.stores import Remote
from mhla_lightning.data.tokenizers import TextStream, Tokenizer, open_tokenizer, same_tokenizer, tokenizer_of
from mhla_lightning.data.tokenizers.base import ByteTokenizer
from mhla_lightning.errors import DataError
from tests.helpers.errors import refused

tokenizers = pytest.importorskip("tokenizers")

TEXTS = [
    "",
    " ",
    "\n\n  two spaces\tand a tab \r\n",
    "plain words, again plain words",
    "naïve café — “quoted” … ½ €",
    "日本語のテキスト 한국어 العربية",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 \u200b\ufeff",
    "\x00\x01\x7f\x80\xa0\xad\u0100\uffff\U0010ffff",
    f"a quoted {END} is text, and so are <s> </s> <0x0A> ▁ Ġ",
]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bpe")
    (folder / "text.txt").write_text("plain words, and again plain words: naïve café 日本語 日本語\n" * 20)
    return train_and_name(folder / "text.txt", folder / "tokenizer.json")


def train_and_name(text: Path, to: Path) -> Path:
    train_tokenizer([str(text)], to, 320)
    return to


def _sentencepiece(path: Path, prefix: bool) -> Path:
    """A tokenizer as Llama's converter writes it: U+2581 for spaces, <0x..> for bytes, perhaps a space
    before the text.
    """
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "a",
        "b",
        "▁a",
        "ab",
        "▁ab",
    ]
    merges = [("▁", "a"), ("a", "b"), ("▁a", "b")]
    core = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab={piece: number for number, piece in enumerate(pieces)},
            merges=merges,
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    core.normalizer = tokenizers.normalizers.Sequence(
        [*([tokenizers.normalizers.Prepend("▁")] if prefix else []), tokenizers.normalizers.Replace(" ", "▁")]
    )
    steps: list[Any] = [
        tokenizers.decoders.Replace("▁", " "),
        tokenizers.decoders.ByteFallback(),
        tokenizers.decoders.Fuse(),
    ]
    core.decoder = tokenizers.decoders.Sequence(
        [*steps, *([tokenizers.decoders.Strip(" ", 1, 0)] if prefix else [])]
    )
    core.add_special_tokens(["<unk>", "<s>", "</s>"])
    core.save(str(path))
    return path


@pytest.fixture(params=["bytes", "byte-level", "sentencepiece", "sentencepiece with a space"])
def tokenizer(request: pytest.FixtureRequest, bpe: Path, tmp_path: Path) -> Tokenizer:
    if request.param == "bytes":
        return open_tokenizer("bytes")
    if request.param == "byte-level":
        return open_tokenizer(str(bpe))
    return open_tokenizer(str(_sentencepiece(tmp_path / "tokenizer.json", request.param.endswith("space"))))


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_every_text_decodes_to_itself_and_its_bytes_are_counted(tokenizer: Tokenizer, text: str) -> None:
    if tokenizer.encode("▁") == tokenizer.encode(" "):
        text = text.replace("▁", "_")  # sentencepiece's own mark for a space
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert [int(number) for number in tokenizer.encode_array(text)] == ids
    assert tokenizer.encode_many([text, "a"]) == [ids, tokenizer.encode("a")]
    assert all(0 <= number < tokenizer.vocabulary for number in ids)
    assert tokenizer.end not in ids, "the end of a document is never read out of a text"
    added = len(tokenizer.bytes_of(ids)) - len(text.encode())
    assert tokenizer.token_bytes[ids].sum() == len(tokenizer.bytes_of(ids)) if ids else added == 0
    assert added == (1 if tokenizer.bytes_of(ids) == f" {text}".encode() else 0)


def test_bytes_of_every_id(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_bytes.dtype == np.int64
    assert tokenizer.token_bytes.shape == (tokenizer.vocabulary,)
    assert tokenizer.end is not None
    assert tokenizer.token_bytes[tokenizer.end] == 0
    assert tokenizer.decode([tokenizer.end]) == ""
    singles = {piece for piece in tokenizer.pieces if len(piece) == 1}
    assert singles == {bytes([value]) for value in range(256)}, "every byte can be written"


def test_the_bytes_tokenizer() -> None:
    found = open_tokenizer("bytes")
    assert (found.name, found.vocabulary, found.end, found.files) == ("bytes", 257, 256, {})
    assert found.encode("aé") == [97, 195, 169]
    assert found.decode([97, 195, 256, 98]) == "a\N{REPLACEMENT CHARACTER}b"
    with refused("ids"):
        found.decode([257])
    with refused("ids"):
        found.decode([-1])


def test_sentencepiece_spells_spaces_and_bytes(tmp_path: Path) -> None:
    found = open_tokenizer(str(_sentencepiece(tmp_path / "tokenizer.json", True)))
    assert found.end == 2
    assert found.encode("ab\n") == [264, 13]
    assert found.token_bytes[[264, 13, 0, 1, 2]].tolist() == [3, 1, 0, 0, 0]
    assert found.decode([264, 13]) == "ab\n"


def test_vocabulary_with_holes_and_added_tokens(bpe: Path, tmp_path: Path) -> None:
    content = json.loads(bpe.read_text())
    vocabulary = content["model"]["vocab"]
    token, number = next(
        (token, number) for token, number in vocabulary.items() if number == max(vocabulary.values())
    )
    vocabulary[token] = 400
    content["added_tokens"].append(
        {**content["added_tokens"][0], "id": number, "content": "é  é", "special": False}
    )
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    found = open_tokenizer(str(tmp_path))
    assert found.vocabulary == 401
    assert found.pieces[399] == b""
    assert found.bytes_of([400]) == open_tokenizer(str(bpe)).bytes_of([number])
    assert "é  é".encode() in [found.pieces[number] for number in found.encode("xé  éx")]
    assert found.decode(found.encode("xé  éx")) == "xé  éx"


CUT = "aé€🙂👩‍👧 \N{COMBINING ACUTE ACCENT}z"


@pytest.mark.parametrize("cut", range(len(CUT.encode()) + 1))
def test_a_stream_never_gives_half_a_character(cut: int) -> None:
    stream, ids = TextStream(ByteTokenizer()), list(CUT.encode())
    first = stream.push(*ids[:cut])
    assert "\N{REPLACEMENT CHARACTER}" not in first
    assert CUT.startswith(first)
    assert first + stream.push(*ids[cut:]) == CUT
    assert stream.finish() == ""


def test_a_stream_gives_each_character_with_its_last_byte() -> None:
    stream = TextStream(ByteTokenizer())
    assert [stream.push(byte) for byte in "é€🙂".encode()] == ["", "é", "", "", "€", "", "", "", "🙂"]
    assert stream.push(0xF0, 0x9F) == ""
    assert stream.finish() == "\N{REPLACEMENT CHARACTER}", "half a character at the very end is told of"
    assert stream.push(97, 256) == "a"
    assert stream.push(0xC3, 97) == "\N{REPLACEMENT CHARACTER}a", "and so is one that is broken off"


def test_a_stream_of_a_bpe(bpe: Path) -> None:
    found = open_tokenizer(str(bpe))
    text = "".join(TEXTS)
    stream = TextStream(found)
    pieces = [stream.push(number) for number in found.encode(text)]
    assert "".join(pieces) + stream.finish() == text


@pytest.mark.parametrize("named", ["file", "folder", "copy"])
def test_a_tokenizer_is_named_by_its_content(bpe: Path, tmp_path: Path, named: str) -> None:
    first = open_tokenizer(str(bpe))
    first.save(tmp_path)
    shutil.copy(bpe, tmp_path / "other.json")
    again = open_tokenizer(str({"file": bpe, "folder": tmp_path, "copy": tmp_path / "other.json"}[named]))
    assert again.name == first.name
    assert again.name.startswith("tokenizer.json sha256:")
    assert len(again.name.partition("sha256:")[2]) == 16
    assert again.end == first.end == 0
    assert again.files["tokenizer.json"] == bpe.read_bytes()


def test_names_of_the_same_content_mean_the_same() -> None:
    assert same_tokenizer("gpt2 sha256:ab", "tokenizer.json sha256:ab")
    assert same_tokenizer("bytes", "bytes")
    assert same_tokenizer(None, None)
    assert not same_tokenizer("gpt2 sha256:ab", "gpt2 sha256:ac")
    assert not same_tokenizer("gpt2", "bytes")
    assert not same_tokenizer("gpt2", None)


def test_the_end_that_a_config_names(bpe: Path, tmp_path: Path) -> None:
    shutil.copy(bpe, tmp_path / "tokenizer.json")
    for token, end in (("a", "a"), ({"content": "b"}, "b")):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": token}))
        found = open_tokenizer(str(tmp_path))
        assert found.end == json.loads(bpe.read_text())["model"]["vocab"][end]
    saved = tmp_path / "saved"
    saved.mkdir()
    found.save(saved)
    assert open_tokenizer(str(saved)).end == found.end
    (tmp_path / "tokenizer_config.json").write_text("{")
    with refused(str(tmp_path / "tokenizer.json"), DataError):
        open_tokenizer(str(tmp_path))


def test_the_tokenizer_of_a_data_folder(bpe: Path, tmp_path: Path) -> None:
    found = open_tokenizer(str(bpe))
    index = ShardIndex("tokens", (), tokenizer=found.name, length=8)
    with refused(str(tmp_path / "tokenizer.json"), DataError):
        tokenizer_of(tmp_path, index)
    found.save(tmp_path)
    again = tokenizer_of(tmp_path, index)
    assert (again.name, again.vocabulary, again.end) == (found.name, found.vocabulary, found.end)
    with refused(str(tmp_path / "tokenizer.json"), DataError):
        tokenizer_of(tmp_path, ShardIndex("tokens", (), tokenizer="gpt2 sha256:0", length=8))
    assert tokenizer_of(tmp_path, ShardIndex("tokens", (), tokenizer="bytes", length=8)).name == "bytes"
    with refused(str(tmp_path), DataError):
        tokenizer_of(tmp_path, ShardIndex("tokens", (), length=8))


def test_the_tokenizer_of_a_remote_folder(bpe: Path, tmp_path: Path, server: Any) -> None:
    found = open_tokenizer(str(bpe))
    found.save(tmp_path)
    server.files = {f"/data/{path.name}": path.read_bytes() for path in tmp_path.iterdir()}
    again = tokenizer_of(
        f"{server.url}/data", ShardIndex("tokens", (), tokenizer=found.name, length=8), Remote(retries=0)
    )
    assert again.encode(TEXTS[4]) == found.encode(TEXTS[4])


BROKEN = {
    "no JSON": "{",
    "another JSON": '{"a": 1}',
    "a list": "[]",
    "WordPiece": "wordpiece",
    "no decoder": "none",
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_files_that_cannot_be_used(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tokenizer.json"
    if content in ("wordpiece", "none"):
        core = tokenizers.Tokenizer(tokenizers.models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
        if content == "wordpiece":
            core.decoder = tokenizers.decoders.WordPiece()
        core.save(str(path))
    else:
        path.write_text(content)
    with refused(str(path), DataError) as error:
        open_tokenizer(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("spec", ["missing.json", "../nothing", "/no/where", "a b", "a/b/c", ""])
def test_names_that_are_none(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with refused("tokenizer"):
        open_tokenizer(spec)


def test_names_of_the_hub(bpe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")

    def download(name: str, file: str) -> str:
        if (name, file) == ("gpt2", "tokenizer.json"):
            return str(bpe)
        raise OSError(f"nothing\n called {name}/{file}")

    monkeypatch.setattr(hub, "hf_hub_download", download)
    assert open_tokenizer("gpt2").name == open_tokenizer(str(bpe)).name.replace("tokenizer.json", "gpt2")
    with refused("tokenizer") as error:
        open_tokenizer("org/name")
    assert "\n" not in str(error.value)


def test_without_the_package(bpe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with refused(None):
        open_tokenizer(str(bpe))
    assert open_tokenizer("bytes").encode("a") == [97]


@pytest.mark.slow
def test_training_is_the_same_in_every_process(bpe: Path, tmp_path: Path) -> None:
    for threads in (1, 2):
        command = [
            sys.executable,
            "-m",
            "mhla_lightning",
            "data",
            "train-tokenizer",
            str(bpe.parent / "text.txt"),
        ]
        command += [
            "--to",
            str(tmp_path / f"{threads}.json"),
            "--vocabulary",
            "320",
            "--workers",
            str(threads),
            "--json",
            str(tmp_path / "table.json"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / f"{threads}.json").read_bytes() == bpe.read_bytes()
    (row,) = json.loads((tmp_path / "table.json").read_text())["rows"]
    found, text = open_tokenizer(str(bpe)), (bpe.parent / "text.txt").read_text()
    assert (row["vocabulary"], row["documents"], row["bytes"]) == (found.vocabulary, 1, len(text.encode()))
    assert row["bytes_per_token"] == round(len(text.encode()) / len(found.encode(text)), 3)
    assert row["bytes_per_token"] > 2
    assert found.pieces[0] == b""
    assert found.end == 0


BAD_TRAINING = {
    "few ids": (["TEXT", "--to", "x.json", "--vocabulary", "256"], "--vocabulary"),
    "no json": (["TEXT", "--to", "x", "--vocabulary", "300"], "--to"),
    "in use": (["TEXT", "--to", "TEXT.json", "--vocabulary", "300"], "text.txt.json"),
    "no folder": (["TEXT", "--to", "no/x.json", "--vocabulary", "300"], "--to"),
    "no text": (["EMPTY", "--to", "x.json", "--vocabulary", "300"], "empty.txt"),
    "no input": (["nothing", "--to", "x.json", "--vocabulary", "300"], "nothing"),
    "no workers": (["TEXT", "--to", "x.json", "--vocabulary", "300", "--workers", "0"], "--workers"),
}


@pytest.mark.parametrize(("arguments", "named"), BAD_TRAINING.values(), ids=BAD_TRAINING)
def test_bad_training(
    arguments: list[str],
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in (("text.txt", "some text"), ("empty.txt", ""), ("text.txt.json", "{}")):
        Path(name).write_text(content)
    words = [word.replace("TEXT", "text.txt").replace("EMPTY", "empty.txt") for word in arguments]
    assert main(["data", "train-tokenizer", *words]) == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.txt", "text.txt", "text.txt.json"]
