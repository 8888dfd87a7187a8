"""What a file of text is, by its content: every form gives the same documents, and bad rows are counted."""

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mhla_lightning.cli.main import main
from mhla_lightning.data.prepare.text.documents import BadRow, RowTally
from mhla_lightning.data.prepare.text.inputs import Inputs, open_inputs
from mhla_lightning.data.prepare.text.tokenize import TextOptions, tokenize
from mhla_lightning.data.prepare.text.train import train_tokenizer
from mhla_lightning.errors import DataError, UserError
from tests.helpers.errors import refused

TEXTS = ["one", "two\nlines, and a \u2028", 'three "quoted"', "vier é 🙂", "tab\tbed"]
ROWS: list[dict[str, Any]] = [
    {"text": text, "url": f"http://x/{number}"} for number, text in enumerate(TEXTS)
]
PARQUET = ("pyarrow", "pyarrow.parquet")


def lines(rows: list[Any], **options: Any) -> bytes:
    return b"".join(json.dumps(row, **options).encode() + b"\n" for row in rows)


def table(rows: list[dict[str, Any]], delimiter: str = ",", end: str = "\n") -> bytes:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter, lineterminator=end)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


def zstd(data: bytes) -> bytes:
    return bytes(pytest.importorskip("zstandard").compress(data))


def long_window(data: bytes) -> bytes:
    """A frame as `zstd --long=31` writes it: a window of 2 GiB, one raw block."""
    return b"\x28\xb5\x2f\xfd\x00\xa8" + (len(data) << 3 | 1).to_bytes(3, "little") + data


def documents(*paths: Path, column: str = "text") -> list[str | None]:
    """All documents; a row that cannot be read is its reason."""
    opened = open_inputs([str(path) for path in paths], column)
    found = (text for source in opened.sources for group in source.groups(64) for text in group.texts())
    return [text.reason if isinstance(text, BadRow) else text for text in found]


def opened_folder(folder: Path, files: dict[str, bytes]) -> Inputs:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return open_inputs([str(folder)])


JSON_LINES = lines(ROWS)
HALF = len(lines(ROWS[:2]))
FORMS: dict[str, Callable[[], bytes]] = {
    "a.json": lambda: JSON_LINES,
    "a.ndjson": lambda: JSON_LINES,
    "a.jl": lambda: JSON_LINES,
    "part-00000": lambda: JSON_LINES,
    "a.txt": lambda: JSON_LINES,
    "a.json.gz": lambda: gzip.compress(JSON_LINES),
    "named.json": lambda: gzip.compress(JSON_LINES),
    "members.json.gz": lambda: gzip.compress(JSON_LINES[:HALF]) + gzip.compress(JSON_LINES[HALF:]),
    "a.json.zst": lambda: zstd(JSON_LINES),
    "frames.jsonl.zst": lambda: zstd(JSON_LINES[:HALF]) + zstd(JSON_LINES[HALF:]),
    "skippable.jsonl.zst": lambda: b"\x50\x2a\x4d\x18\x04\0\0\0abcd" + zstd(JSON_LINES),
    "long.jsonl.zst": lambda: long_window(JSON_LINES),
    "a.jsonl.xz": lambda: lzma.compress(JSON_LINES),
    "a.jsonl.bz2": lambda: bz2.compress(JSON_LINES[:HALF]) + bz2.compress(JSON_LINES[HALF:]),
    "array.json": lambda: json.dumps(ROWS).encode(),
    "pretty.json.gz": lambda: gzip.compress(json.dumps(ROWS, indent=2).encode()),
    "arrays.json": lambda: json.dumps(ROWS[:2]).encode() + b"\n" + json.dumps(ROWS[2:]).encode(),
    "objects.json": lambda: b"\n".join(json.dumps(row, indent=1).encode() for row in ROWS),
    "array.jsonl": lambda: json.dumps(ROWS, indent=2).encode(),
    "raw.jsonl": lambda: lines(ROWS, ensure_ascii=False),
    "mark.json": lambda: b"\xef\xbb\xbf" + JSON_LINES,
    "crlf.json": lambda: JSON_LINES.replace(b"\n", b"\r\n"),
    "utf16.json": lambda: lines(ROWS, ensure_ascii=False).decode().encode("utf-16"),
    "utf16.array.json": lambda: json.dumps(ROWS, ensure_ascii=False).encode("utf-16"),
    "a.csv": lambda: table(ROWS),
    "crlf.csv.gz": lambda: gzip.compress(table(ROWS, end="\r\n")),
    "semicolon.csv": lambda: table(ROWS, ";"),
    "mark.csv": lambda: b"\xef\xbb\xbf" + table(ROWS),
    "utf16.csv": lambda: table(ROWS).decode().encode("utf-16"),
    "a.tsv": lambda: table(ROWS, "\t"),
    "a.tsv.zst": lambda: zstd(table(ROWS, "\t")),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_documents(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(FORMS[name]())
    assert documents(tmp_path / name) == TEXTS


def test_documents_that_are_one_file_each(tmp_path: Path) -> None:
    """A compressed file of text, UTF-16 and a byte order mark; what is no text is None."""
    content = {
        "a.txt.gz": gzip.compress(b"plain\r\n"),
        "b.txt": "\ufeffmark é".encode("utf-16-le"),
        "c.txt": b"\xef\xbb\xbf",
        "d.md": b"[link](x) {",
        "e.txt": b"caf\xe9",
        "f.py": b'{"a": 1}',
        "g.txt": b"{ unbalanced\n",
    }
    inputs = opened_folder(tmp_path / "in", content)
    assert inputs.taken == {"plain text": 7}
    assert documents(tmp_path / "in") == [
        "plain\r\n",
        "mark é",
        "",
        "[link](x) {",
        None,
        '{"a": 1}',
        "{ unbalanced\n",
    ]


def test_rows_of_all_lengths_in_one_array(tmp_path: Path) -> None:
    """Rows larger than one read, numbers of any length, and strings that look like structure."""
    rows = [{"text": f'{number}]}},{{"' * (2 ** (number % 17)), "n": 1} for number in range(60)]
    encoded = json.dumps(rows).replace('"n": 1', f'"n": {"9" * 5000}')
    (tmp_path / "a.json").write_text(encoded)
    assert documents(tmp_path / "a.json") == [row["text"] for row in rows]
    (tmp_path / "a.jsonl").write_text('{"text": "x", "n": ' + "9" * 5000 + "}\n")
    assert documents(tmp_path / "a.jsonl") == ["x"]


BAD = {
    "latin": (b'{"text": "caf\xe9"}', 1),
    "number": (b'{"text": 5}', 1),
    "no key": (b'{"content": "x"}', 1),
    "list": (b'["x"]', 1),
    "cut": (b'{"text": "x', 1),
    "deep": (b'{"text": ' + b"[" * 100_000 + b"}", 1),
    "null": (b'{"text": null}', 0),
    "empty": (b'{"text": ""}', 0),
    "blank": (b"  ", 0),
    "half a character": (b'{"text": "\\ud83d"}', 0),
}


@pytest.mark.parametrize(("row", "bad"), BAD.values(), ids=BAD)
def test_a_bad_row_of_json_lines(row: bytes, bad: int, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(ROWS) + row + b"\n" + lines(ROWS))
    found = documents(tmp_path / "a.jsonl")
    wrong = [text for text in found if text and text not in TEXTS]
    assert [text for text in found if text in TEXTS] == [*TEXTS, *TEXTS]
    if bad:
        assert len(wrong) == 1
        assert str(wrong[0]).startswith("line 6")
    else:
        assert wrong in ([], ["\N{REPLACEMENT CHARACTER}"])


def test_bad_rows_of_an_array_and_of_tables(tmp_path: Path) -> None:
    rows = json.dumps(ROWS, indent=0).encode().split(b"\n{")
    (tmp_path / "a.json").write_bytes(b"\n{".join([*rows[:2], b'"text": "caf\xe9"},', *rows[2:]]))
    found = documents(tmp_path / "a.json")
    assert [text for text in found if text in TEXTS] == TEXTS
    assert [text for text in found if text not in TEXTS] == ["item 2 is no UTF-8"]
    (tmp_path / "broken.json").write_bytes(b"\n{".join([*rows[:2], b'"text": oops},', *rows[2:]]))
    found = documents(tmp_path / "broken.json")
    assert [text for text in found if text in TEXTS] == TEXTS
    assert len(found) == 6
    (tmp_path / "a.csv").write_bytes(table(ROWS[:1]) + b"caf\xe9,u\nshort\na,b,c\n,empty\n" + b"last,u\n")
    assert documents(tmp_path / "a.csv") == [
        "one",
        "line 3 is no UTF-8",
        "line 4 has 1 fields, and the header 2",
        "line 5 has 3 fields, and the header 2",
        "",
        "last",
    ]


def test_columns_of_parquet_of_every_type(tmp_path: Path) -> None:
    pa, parquet = (pytest.importorskip(name) for name in PARQUET)
    wanted = ["one", "two", "one"]
    columns = {
        "string": pa.array([*wanted, None]),
        "large": pa.array([*wanted, None], pa.large_string()),
        "view": pa.array([*wanted, None], pa.string_view()),
        "dictionary": pa.array([*wanted, None]).dictionary_encode(),
        "nested": pa.array([{"text": text, "n": 1} for text in [*wanted, None]]),
    }
    parquet.write_table(pa.table(columns), tmp_path / "a.parquet", row_group_size=3)
    for column in columns:
        name = "nested.text" if column == "nested" else column
        assert documents(tmp_path / "a.parquet", column=name) == [*wanted, ""], column
    with refused(str(tmp_path / "a.parquet"), DataError) as error:
        documents(tmp_path / "a.parquet", column="text")
    assert "'nested.text'" in error.value.reason
    (tmp_path / "a.jsonl").write_bytes(lines([{"nested": {"text": text}} for text in wanted]))
    assert documents(tmp_path / "a.jsonl", column="nested.text") == wanted
    assert "'nested.text'" in (documents(tmp_path / "a.jsonl")[0] or "")


def test_a_bad_value_of_parquet(tmp_path: Path) -> None:
    pa, parquet = (pytest.importorskip(name) for name in PARQUET)
    data, ends = b"onecaf\xe9two", [0, 3, 7, 10]
    offsets = pa.py_buffer(b"".join(end.to_bytes(4, "little") for end in ends))
    values = pa.StringArray.from_buffers(3, offsets, pa.py_buffer(data))
    indices = pa.array([0, 1, 2, None], pa.int32())
    for name, column in {
        "plain": pa.chunked_array([values, pa.array([None], pa.string())]),
        "dictionary": pa.DictionaryArray.from_arrays(indices, values),
    }.items():
        parquet.write_table(pa.table({"text": column}), tmp_path / f"{name}.parquet")
        found = documents(tmp_path / f"{name}.parquet")
        assert (found[0], found[2], found[3]) == ("one", "two", ""), name
        assert (found[1] or "").startswith("row 2 of row group 0 is no UTF-8"), name


def test_the_share_that_may_be_bad(tmp_path: Path) -> None:
    """199 good rows and one bad one are 0.5 %; of 99 and one, 1 % is allowed; of 98 and one it is not."""
    for good, bad, share, passes in [
        (199, 1, 0.01, True),
        (99, 1, 0.01, True),
        (98, 1, 0.01, False),
        (6, 1, 0.2, True),
        (6, 1, 0.0, False),
        (0, 3, 1.0, False),
    ]:
        tally = RowTally()
        for _ in range(good):
            tally.add("text")
        for number in range(bad):
            tally.add(BadRow("a.jsonl", f"line {number}"))
        if passes:
            tally.judge(share)
        else:
            with refused("a.jsonl", DataError) as error:
                tally.judge(share)
            assert f"{bad} of {good + bad} rows" in error.value.reason
    tally = RowTally()
    for number in range(100):
        tally.demand_any()
        tally.add(BadRow("a.jsonl", f"line {number}"))
    with refused("a.jsonl", DataError):
        tally.demand_any()
    for value in (-0.1, 1.1):
        with refused("max_skipped_share"):
            TextOptions(max_skipped_share=value)


def test_bad_rows_are_counted_by_both_verbs(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(ROWS * 4) + b'{"text": 5}\n{"text": null}\n')
    options = TextOptions(length=64, val=1, max_skipped_share=0.1)
    report = tokenize([str(tmp_path / "a.jsonl")], tmp_path / "out", options)
    assert (report.skipped.rows, report.skipped.bad, report.empty) == (22, 1, 1)
    assert report.skipped.first == BadRow(
        str(tmp_path / "a.jsonl"),
        "line 21: the key 'text' holds a JSON number, no text: choose `text_column`",
    )
    assert sum(part.documents for part in report.splits.values()) == 20
    assert sum(part.bytes for part in report.splits.values()) == 4 * sum(len(text.encode()) for text in TEXTS)
    pytest.importorskip("tokenizers")
    learned = train_tokenizer([str(tmp_path / "a.jsonl")], tmp_path / "t.json", 300, max_skipped_share=0.1)
    assert (learned.documents, learned.skipped.rows, learned.skipped.bad) == (20, 22, 1)
    with refused(str(tmp_path / "a.jsonl"), DataError):
        train_tokenizer([str(tmp_path / "a.jsonl")], tmp_path / "u.json", 300)
    assert not (tmp_path / "u.json").exists()


def test_a_larger_share_goes_on_with_the_same_chunks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mhla_lightning.data.prepare.text.chunks.LEAST_BYTES", 200)
    (tmp_path / "a.jsonl").write_bytes(lines(ROWS * 4) + b"{\n")
    words = ["data", "tokenize", str(tmp_path / "a.jsonl"), "--to", str(tmp_path / "out"), "--length", "64"]
    words += ["--val", "1", "--workers", "1"]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "line 21 is no JSON" in error
    assert "--max-skipped-share 0.01" in error
    assert main([*words, "--max-skipped-share", "0.1"]) == 0
    said = capsys.readouterr().out
    assert "chunks were tokenized before and are kept" in said
    assert "left out: 1 row; " in said


# Files of a folder, what is read as what, and what is left out with a part of the reason.
FOLDERS: dict[str, tuple[dict[str, bytes], dict[str, int], dict[str, str]]] = {
    "beside JSON lines": (
        {
            "README.md": b"# about",
            "dataset_infos.json": b'{"default": {"features": 1}}',
            "stats.json": b'{\n "rows": 3\n}',
            ".gitattributes": b"x",
            "data/a.json.gz": gzip.compress(JSON_LINES),
            "notes.txt": b"a note",
            "more.zip": b"PK\x03\x04 abc",
        },
        {"JSON lines": 1, "plain text": 1},
        {
            "README.md": "describes",
            "dataset_infos.json": "no key 'text'",
            "stats.json": "'rows'",
            ".gitattributes": "hidden",
            "more.zip": "zip",
        },
    ),
    "a folder of sources": (
        {
            "a.py": b"print()",
            "package.json": b'{\n "name": "x"\n}',
            "t.csv": b"a,b\n1,2\n",
            "README.md": b"#",
        },
        {"plain text": 4},
        {},
    ),
    "rows without the key beside text": (
        {"a.txt": b"text", "b.json": lines([{"a": 1}] * 3)},
        {"plain text": 1},
        {"b.json": "'a'"},
    ),
    "several forms": (
        {
            "a.json": JSON_LINES,
            "b.json": json.dumps(ROWS).encode(),
            "c.csv": table(ROWS),
            "d.tsv": table(ROWS, "\t"),
        },
        {"JSON lines": 1, "JSON": 1, "CSV": 1, "TSV": 1},
        {},
    ),
}


@pytest.mark.parametrize(("files", "taken", "left_out"), FOLDERS.values(), ids=FOLDERS)
def test_what_was_taken_for_what(
    files: dict[str, bytes], taken: dict[str, int], left_out: dict[str, str], tmp_path: Path
) -> None:
    found = opened_folder(tmp_path / "in", files)
    assert found.taken == taken
    reasons = {file.rpartition("/")[2]: reason for file, reason in found.left_out}
    assert reasons.keys() == left_out.keys()
    assert all(fact in reasons[name] for name, fact in left_out.items())


def test_files_of_a_data_set_named_by_a_pattern(tmp_path: Path) -> None:
    """The shell makes `data/*` the names of all files, README.md among them."""
    opened_folder(tmp_path, {"README.md": b"#", "a.jsonl": JSON_LINES, "infos.json": b'{"a": 1}'})
    found = open_inputs([str(path) for path in sorted(tmp_path.iterdir())])
    assert found.taken == {"JSON lines": 1}
    assert {Path(file).name for file, _ in found.left_out} == {"README.md", "infos.json"}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "README.md").write_text("a text that somebody names")
    found = open_inputs([str(tmp_path / "a.jsonl"), str(tmp_path / "other" / "README.md")])
    assert found.taken == {"JSON lines": 1, "plain text": 1}


REFUSED = {
    "another key": ({"a.json": lines([{"content": "x", "url": "y"}])}, "'content', 'url'"),
    "an array of texts": ({"a.json": b'["x", "y"]'}, "no objects"),
    "a table without it": ({"a.csv": b"id,body\n1,x\n"}, "'id', 'body'"),
    "no zstd": ({"a.json.zst": b'{"text": "x"}'}, "is no zstd file"),
    "cut": ({"a.json.gz": gzip.compress(JSON_LINES * 900)[:-30]}, "cannot be read to its end"),
}


@pytest.mark.parametrize(("files", "fact"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(files: dict[str, bytes], fact: str, tmp_path: Path) -> None:
    for named in (True, False):
        folder = tmp_path / str(named)
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)
        path = folder / next(iter(files))
        with pytest.raises(UserError) as error:
            documents(path if named else folder)
        assert error.value.key == str(path)
        assert fact in error.value.reason


def test_empty_files(tmp_path: Path) -> None:
    for name in ("a.json", "b.jsonl", "c.csv", "d.txt", "e.ndjson"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "f.json.gz").write_bytes(gzip.compress(b""))
    assert [text for text in documents(tmp_path) if text] == []
