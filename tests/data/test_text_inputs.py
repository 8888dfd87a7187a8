"""Sources of text: every kind of input gives the same documents.

Mistakes are reported on one line.
"""

import gzip
import json
import os
import sys
from pathlib import Path

import pytest

from mhla_lightning.cli.main import main
from mhla_lightning.data.prepare.text import chunks, inputs
from mhla_lightning.data.prepare.text.tokenize import TextOptions, TokenizeReport, tokenize
from mhla_lightning.errors import DataError
from tests.helpers.errors import refused
from tests.helpers.texts import documents_of, read_rows, text_folder, texts_of_all_lengths

COLUMN = "content"


def _write(path: Path, texts: list[str]) -> None:
    lines = "".join(
        f"{json.dumps({'id': number, COLUMN: text}, ensure_ascii=number % 2 == 0)}\n"
        for number, text in enumerate(texts)
    ).encode()
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines[:1000]) + gzip.compress(lines[1000:]))
    elif path.name.endswith(".zst"):
        zstandard = pytest.importorskip("zstandard")
        path.write_bytes(zstandard.compress(lines[:1000]) + zstandard.compress(lines[1000:]))
    elif path.name.endswith(".parquet"):
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"id": range(len(texts)), COLUMN: texts}), path, row_group_size=7)
    else:
        path.write_bytes(lines)


OPTIONS = TextOptions(length=64, val=5, text_column=COLUMN)


@pytest.fixture(scope="module")
def texts_and_hashes(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], dict[str, str]]:
    root, texts = tmp_path_factory.mktemp("texts"), texts_of_all_lengths(50, 120)
    report = tokenize([str(text_folder(root / "in", texts))], root / "out", OPTIONS)
    return texts, _hashes(report)


def _hashes(report: TokenizeReport) -> dict[str, str]:
    return {name: index.hash for name, index in report.indices.items()}


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
@pytest.mark.parametrize("in_folder", [False, True], ids=["file", "folder"])
def test_every_format_gives_the_same_documents(
    texts_and_hashes: tuple[list[str], dict[str, str]],
    tmp_path: Path,
    name: str,
    in_folder: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(chunks, "LEAST_BYTES", 700)  # many chunks
    (tmp_path / "in").mkdir()
    _write(tmp_path / "in" / name, texts_and_hashes[0])
    report = tokenize(
        [str(tmp_path / "in" if in_folder else tmp_path / "in" / name)], tmp_path / "out", OPTIONS, workers=1
    )
    assert _hashes(report) == texts_and_hashes[1]


def test_several_inputs_are_read_in_their_order(
    texts_and_hashes: tuple[list[str], dict[str, str]], tmp_path: Path
) -> None:
    texts = texts_and_hashes[0]
    text_folder(tmp_path / "a", texts[:10])
    _write(tmp_path / "b.jsonl.gz", texts[10:35])
    _write(tmp_path / "c.parquet", texts[35:])
    report = tokenize(
        [f"text:{tmp_path / 'a'}", str(tmp_path / "b.jsonl.gz"), str(tmp_path / "c.parquet")],
        tmp_path / "out",
        OPTIONS,
    )
    assert _hashes(report) == texts_and_hashes[1]


def test_a_data_set_of_the_hub(
    texts_and_hashes: tuple[list[str], dict[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(name: str, config: str | None, split: str) -> object:
        asked.append((name, config, split))
        if name == "none":
            raise ValueError("there is\n no such thing")
        return datasets.Dataset.from_dict({"id": range(50), COLUMN: texts_and_hashes[0]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    for number, spec in enumerate(
        ("hf:org/name", "hf:org/name:part", "hf:org/name::validation", "hf:org/name:part:test")
    ):
        assert _hashes(tokenize([spec], tmp_path / f"{number}", OPTIONS)) == texts_and_hashes[1]
    assert asked == [
        ("org/name", None, "train"),
        ("org/name", "part", "train"),
        ("org/name", None, "validation"),
        ("org/name", "part", "test"),
    ]
    for arguments, key in {
        ("hf:none",): "hf:none",
        ("hf:",): "INPUT",
        ("hf:a:b:c:d",): "INPUT",
        ("hf:a",): "hf:a",
        ("hf:a", "--text-column", "id"): "hf:a",
    }.items():
        assert main(["data", "tokenize", *arguments, "--to", str(tmp_path / "bad"), "--workers", "1"]) == 2
        assert_one_line(capsys.readouterr().err, key)


def test_the_standard_library_is_read_in_order_and_without_tests() -> None:
    (found,) = inputs.open_inputs(["stdlib"]).sources
    (again,) = inputs.open_inputs(["stdlib"]).sources
    paths = [path for group in found.groups(10**6) for path in group.paths]  # type: ignore[attr-defined]
    assert found.fingerprint == again.fingerprint
    assert found.size > 5_000_000
    assert paths == sorted(paths)
    assert {"os.py", "ast.py", "decoder.py"} <= {path.name for path in paths}
    assert not [
        path
        for path in paths
        if {"test", "tests", "site-packages", "__pycache__"} & set(path.parts) or path.suffix != ".py"
    ]
    assert not [path for path in paths if path.name.startswith("_sysconfigdata")], (
        "it holds the paths of one machine"
    )


def test_what_is_no_text_is_left_out_and_counted(tmp_path: Path) -> None:
    source = text_folder(tmp_path / "in", texts_of_all_lengths(10, 90))
    (source / "picture.png").write_bytes(b"\x89PNG\xff\xfe")
    (source / "empty.py").write_bytes(b"")
    (source / ".hidden").write_text("hidden")
    (source / ".git").mkdir()
    (source / ".git" / "config").write_text("hidden")
    os.mkfifo(source / "pipe")
    report = tokenize([str(source)], tmp_path / "out", TextOptions(length=64, val=2))
    assert (report.binary, report.empty, sum(part.documents for part in report.splits.values())) == (1, 1, 10)
    (source / "dangling.txt").symlink_to(tmp_path / "nothing")
    with refused(str(source / "dangling.txt"), DataError):
        tokenize([str(source)], tmp_path / "other", TextOptions(length=64))


def test_text_is_kept_as_it_is(tmp_path: Path) -> None:
    texts = ["\ufeffmark\r\nreturns\r", "nul\0 and \x1a", "\U0010ffff 🙂"]
    tokenize([str(text_folder(tmp_path / "in", texts))], tmp_path / "out", TextOptions(length=64, val=1))
    pieces = [
        bytes(piece[:-1]).decode()
        for split in ("train", "val")
        for piece in documents_of(*read_rows(tmp_path / "out", split, 64))
    ]
    assert sorted(pieces) == sorted(text.removeprefix("\ufeff") for text in texts)


def test_half_a_character_in_json_becomes_a_replacement(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud83db"}\n\n{"text": "\\ud83d\\ude42"}\n')
    tokenize([str(tmp_path / "a.jsonl")], tmp_path / "out", TextOptions(length=64, val=1))
    pieces = [
        bytes(piece[:-1]).decode()
        for split in ("train", "val")
        for piece in documents_of(*read_rows(tmp_path / "out", split, 64))
    ]
    assert sorted(pieces) == ["a\N{REPLACEMENT CHARACTER}b", "🙂"]


def assert_one_line(error: str, key: str, fact: str = "") -> None:
    """The error of the command names the key, and the fact in its reason."""
    assert error.startswith(f"error: {key}: ")
    assert fact in error
    assert error.count("\n") == 1
    assert "Traceback" not in error


GOOD = '{"text": "good"}\n'
# Files, arguments, and the key of the error with a fact of its reason.
MISTAKES: dict[str, tuple[dict[str, bytes], list[str], str, str]] = {
    "no such input": ({}, ["nothing"], "INPUT", "nothing"),
    "no such folder": ({}, ["text:nothing"], "INPUT", "text:nothing"),
    "an empty folder": ({"in/.keep": b""}, ["in"], "in", ""),
    "nothing but binary files": ({"in/a.bin": b"\xff"}, ["in"], "in/a.bin", "1 binary"),
    "an empty file": ({"a.txt": b""}, ["a.txt"], "a.txt", ""),
    "one document": ({"a.txt": b"text"}, ["a.txt"], "--val", "1 document"),
    "bad JSON": (
        {"a.jsonl": f"{GOOD * 3}{{'text': 1}}\n{GOOD}".encode()},
        ["a.jsonl"],
        "a.jsonl",
        "line 4 ",
    ),
    "a JSON list": (
        {"a.jsonl": f"{GOOD}\n[1]\n".encode()},
        ["a.jsonl"],
        "a.jsonl",
        "line 3 ",
    ),
    "another key": (
        {"a.jsonl": f'{GOOD}{{"body": "x"}}'.encode()},
        ["a.jsonl"],
        "a.jsonl",
        "'body': choose --text-column",
    ),
    "a number": (
        {"a.jsonl": f'{GOOD}{{"text": 5}}'.encode()},
        ["a.jsonl"],
        "a.jsonl",
        "line 2: ",
    ),
    "no UTF-8": ({"a.jsonl": GOOD.encode() + b'{"text": "\xff"}'}, ["a.jsonl"], "a.jsonl", "line 2 "),
    "no gzip": ({"a.jsonl.gz": GOOD.encode()}, ["a.jsonl.gz"], "a.jsonl.gz", ""),
    "a cut gzip": (
        {"a.jsonl.gz": gzip.compress(os.urandom(5000).hex().encode())[:3000]},
        ["a.jsonl.gz"],
        "a.jsonl.gz",
        "",
    ),
    "no zstandard": (
        {"a.jsonl.zst": GOOD.encode()},
        ["a.jsonl.zst"],
        "a.jsonl.zst",
        "",
    ),
    "no parquet": (
        {"a.parquet": GOOD.encode() * 9},
        ["a.parquet"],
        "a.parquet",
        "",
    ),
    "rows of one token": (
        {"a.txt": b"a", "b.txt": b"b"},
        ["a.txt", "b.txt", "--length", "1"],
        "--length",
        "",
    ),
    "a val row of none": (
        {"a.txt": b"a", "b.txt": b"b"},
        ["a.txt", "b.txt", "--val-length", "0"],
        "--val-length",
        "",
    ),
    "another packing": (
        {"a.txt": b"a"},
        ["a.txt", "--packing", "best"],
        "--packing",
        "did you mean 'best-fit'",
    ),
    "all held out": (
        {"a.txt": b"a", "b.txt": b"b"},
        ["a.txt", "b.txt", "--val", "2"],
        "--val",
        "from 1 to 1",
    ),
    "nothing held out": ({"a.txt": b"a", "b.txt": b"b"}, ["a.txt", "b.txt", "--val", "0"], "--val", ""),
    "no row": (
        {"a.txt": b"a" * 40, "b.txt": b"b" * 40},
        ["a.txt", "b.txt", "--packing", "concatenate", "--length", "30", "--val-length", "50"],
        "--val",
        "41 tokens",
    ),
    "no tokenizer": ({"a.txt": b"a"}, ["a.txt", "--tokenizer", "no.json"], "--tokenizer", "no.json"),
    "no shards": ({"a.txt": b"a"}, ["a.txt", "--shards", "0"], "--shards", ""),
    "no workers": ({"a.txt": b"a"}, ["a.txt", "--workers", "0"], "--workers", ""),
    "inside the input": ({"in/a.txt": b"a"}, ["in", "--to", "in/out"], "--to", "in/out"),
    "an address": (
        {"a.txt": b"a"},
        ["a.txt", "--to", "s3://bucket/x"],
        "--to",
        "s3://bucket/x",
    ),
    "a target in use": (
        {"a.txt": b"a", "used/b": b""},
        ["a.txt", "--to", "used"],
        "/used",
        "",
    ),
}


@pytest.mark.parametrize(("files", "arguments", "key", "fact"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_reported_on_one_line(
    files: dict[str, bytes],
    arguments: list[str],
    key: str,
    fact: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    to = [] if "--to" in arguments else ["--to", "out"]
    workers = [] if "--workers" in arguments else ["--workers", "1"]
    assert main(["data", "tokenize", *arguments, *to, *workers]) == 2
    assert_one_line(capsys.readouterr().err, f"{tmp_path}{key}" if key == "/used" else key, fact)
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before, "nothing is left behind"


def test_columns_of_parquet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _write(tmp_path / "a.parquet", ["one", "two"])
    for column, fact in {"text": "'id', 'content'", "id": "int64"}.items():
        assert (
            main(
                [
                    "data",
                    "tokenize",
                    str(tmp_path / "a.parquet"),
                    "--to",
                    str(tmp_path / "out"),
                    "--text-column",
                    column,
                ]
            )
            == 2
        )
        assert_one_line(capsys.readouterr().err, str(tmp_path / "a.parquet"), fact)


@pytest.mark.parametrize(
    ("package", "name", "key"),
    [
        ("zstandard", "a.jsonl.zst", "a.jsonl.zst"),
        ("pyarrow.parquet", "a.parquet", "a.parquet"),
        ("datasets", "hf:a", "INPUT"),
    ],
)
def test_missing_packages(
    package: str,
    name: str,
    key: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl.zst").write_bytes(b"x")
    Path("a.parquet").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["data", "tokenize", name, "--to", "out"]) == 2
    assert_one_line(capsys.readouterr().err, key, "pip install 'mhla-lightning[language]'")


def test_an_error_in_a_worker_reads_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = json.dumps({"text": "x" * 1000})
    (tmp_path / "a.jsonl").write_text("\n".join([line] * 2500 + ["{"]))
    assert (
        main(
            ["data", "tokenize", str(tmp_path / "a.jsonl"), "--to", str(tmp_path / "out"), "--workers", "2"]
            + ["--max-skipped-share", "0"]
        )
        == 2
    )
    assert_one_line(capsys.readouterr().err.replace("\r", ""), str(tmp_path / "a.jsonl"), "line 2501 ")
