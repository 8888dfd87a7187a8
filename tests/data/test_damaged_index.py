"""Damage to index.json: one sentence that names it before anything is trained."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.damaged import (
    HUGE,
    SAMPLES,
    SHARDS,
    Damage,
    DataSet,
    assert_run_says,
    assert_told,
    entry_with,
    in_place_of,
    make_sparse,
)

pytestmark = [pytest.mark.timeout(30), pytest.mark.usefixtures("little_memory")]


def _top(**changes: Any) -> Callable[[DataSet], None]:
    return lambda data: data.change_index(lambda content: content.update(changes))


def _text(text: str | bytes) -> Callable[[DataSet], object]:
    return lambda data: data.index.write_bytes(text.encode() if isinstance(text, str) else text)


def _named(name: str) -> Damage:
    return Damage(entry_with("name", name), ["a shard is a plain file name ending in .tar"])


def _other_classes(data: DataSet) -> None:
    index = data.root / "val" / "index.json"
    index.write_text(index.read_text().replace('"c"', '"d"'))


def _without_samples(split: str) -> Callable[[DataSet], None]:
    def empty(data: DataSet) -> None:
        data.write()
        path = data.root / split / "index.json"
        content = json.loads(path.read_text()) | {"samples": 0, "shards": []}
        path.write_text(
            json.dumps(content | {"hash": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"})
        )

    return empty


INDEX: dict[str, Damage] = {
    "missing": Damage(lambda d: d.index.unlink(), ["does not exist"]),
    "a folder": Damage(lambda d: in_place_of(d.index, Path.mkdir), ["does not exist"]),
    "a pipe that nobody writes to": Damage(lambda d: in_place_of(d.index, os.mkfifo), ["does not exist"]),
    "cut": Damage(lambda d: os.truncate(d.index, 300), ["cannot be read as JSON"]),
    "100 GB": Damage(lambda d: make_sparse(d.index), [str(HUGE), "at most"]),
    "not UTF-8": Damage(_text(b"\xff\xfe{}"), ["cannot be read as JSON"]),
    "a list": Damage(_text("[]"), ["JSON list where an object"]),
    "nested too deep": Damage(_text("[" * 10**6), ["cannot be read as JSON"]),
    "a key less": Damage(
        lambda d: d.change_index(lambda content: content.pop("classes")), ["lacks the key 'classes'"]
    ),
    "another format": Damage(_top(format=99), ["format 99", "reads format 1"]),
    "unknown kind": Damage(_top(kind="sounds"), ["kind 'sounds'", "valid: images"]),
    "another kind": Damage(_top(kind="tokens", length=4), ["holds tokens", "images with classes are needed"]),
    "no classes": Damage(_top(classes=[]), ["0 classes"]),
    "classes as text": Damage(_top(classes="abc"), ["classes is a str"]),
    "rows of 100 GB": Damage(_top(length=HUGE), [f"rows of {HUGE} tokens"], "tokens"),
    "rows of less than nothing": Damage(_top(length=-6), ["rows of -6 tokens"], "tokens"),
    "length as text": Damage(_top(length="6"), ["length is a str"], "tokens"),
    "wrong hash": Damage(
        lambda d: d.index.write_text(d.index.read_text().replace('"hash": "', '"hash": "0')),
        ["says hash 0", "edited or damaged"],
    ),
    "hash of two lines": Damage(
        lambda d: d.index.write_text(d.index.read_text().replace('"hash": "', '"hash": "\\n')),
        [r"says hash \n", "edited or damaged"],
    ),
    "count and shards disagree": Damage(
        entry_with("samples", SAMPLES - 1), [f"says {SAMPLES * SHARDS} samples", "shards hold 31"]
    ),
    "negative count": Damage(entry_with("samples", -1), ["-1 samples in"]),
    "negative size": Damage(entry_with("bytes", -512), ["samples in -512 bytes"]),
    "count as text": Damage(entry_with("samples", "many"), ["wrong type", "'many'"]),
    "infinite count": Damage(entry_with("samples", float("inf")), ["wrong type", "infinity"]),
    "more samples than bytes": Damage(entry_with("samples", 10**15), ["1000000000000000 samples in"]),
    "size beyond any disk": Damage(entry_with("bytes", 10**30), ["bytes"]),
    "no sha256": Damage(entry_with("sha256", "../../x"), ["the sha256 '../../x'"]),
    "shard twice": Damage(entry_with("name", "000.tar"), ["lists a shard twice: 000.tar"]),
    "shard climbs": _named("../x.tar"),
    "shard is absolute": _named("/etc/passwd"),
    "shard is a command": _named("pipe:cat /etc/passwd; x.tar"),
    "shard pipes": _named("| x.tar"),
    "shard elsewhere": _named("http://127.0.0.1:9/x.tar"),
    "shard with terminal codes": _named("\x1b[2Jx.tar"),
    "shard with half a letter": _named("\ud800.tar"),
    "shard without name": _named(".tar"),
    "train and val have other classes": Damage(
        _other_classes, ["lists other classes", "one list of classes"]
    ),
    "no training samples": Damage(_without_samples("train"), ["lists no samples: the split is empty"]),
    "no validation samples": Damage(_without_samples("val"), ["lists no samples: the split is empty"]),
    "no val": Damage(lambda d: shutil.rmtree(d.root / "val"), ["has no val split"]),
    "train is a file": Damage(lambda d: _in_place_of_folder(d.root / "train"), ["does not exist"]),
}


def _in_place_of_folder(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("not a folder")


@pytest.mark.parametrize("damage", INDEX.values(), ids=INDEX)
def test_a_damaged_index_is_told_before_training(tmp_path: Path, damage: Damage) -> None:
    assert_told(tmp_path, damage, "check", [str(tmp_path)])


IN_ONE_LINE = (
    "cut",
    "shard climbs",
    "shard is a command",
    "infinite count",
    "100 GB",
    "wrong hash",
    "no validation samples",
)


@pytest.mark.parametrize("name", IN_ONE_LINE)
def test_mhla_run_says_it_in_one_line(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert_run_says(recipe, tmp_path / "data", INDEX[name], 0, capsys)
