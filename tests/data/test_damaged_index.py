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
    Damage,
    DataSet,
    assert_refused,
    assert_run_says,
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
    return Damage(entry_with("name", name), "train/index.json")


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


INDEX_FILE, VAL_INDEX = "train/index.json", "val/index.json"
INDEX: dict[str, Damage] = {
    "missing": Damage(lambda d: d.index.unlink(), INDEX_FILE),
    "a folder": Damage(lambda d: in_place_of(d.index, Path.mkdir), INDEX_FILE),
    "a pipe that nobody writes to": Damage(lambda d: in_place_of(d.index, os.mkfifo), INDEX_FILE),
    "cut": Damage(lambda d: os.truncate(d.index, 300), INDEX_FILE),
    "100 GB": Damage(lambda d: make_sparse(d.index), INDEX_FILE),
    "not UTF-8": Damage(_text(b"\xff\xfe{}"), INDEX_FILE),
    "a list": Damage(_text("[]"), INDEX_FILE),
    "nested too deep": Damage(_text("[" * 10**6), INDEX_FILE),
    "a key less": Damage(lambda d: d.change_index(lambda content: content.pop("classes")), INDEX_FILE),
    "another format": Damage(_top(format=99), INDEX_FILE),
    "unknown kind": Damage(_top(kind="sounds"), INDEX_FILE),
    "another kind": Damage(_top(kind="tokens", length=4), INDEX_FILE),
    "no classes": Damage(_top(classes=[]), INDEX_FILE),
    "classes as text": Damage(_top(classes="abc"), INDEX_FILE),
    "rows of 100 GB": Damage(_top(length=HUGE), INDEX_FILE, "tokens"),
    "rows of less than nothing": Damage(_top(length=-6), INDEX_FILE, "tokens"),
    "length as text": Damage(_top(length="6"), INDEX_FILE, "tokens"),
    "wrong hash": Damage(
        lambda d: d.index.write_text(d.index.read_text().replace('"hash": "', '"hash": "0')),
        INDEX_FILE,
    ),
    "hash of two lines": Damage(
        lambda d: d.index.write_text(d.index.read_text().replace('"hash": "', '"hash": "\\n')),
        INDEX_FILE,
    ),
    "count and shards disagree": Damage(entry_with("samples", SAMPLES - 1), INDEX_FILE),
    "negative count": Damage(entry_with("samples", -1), INDEX_FILE),
    "negative size": Damage(entry_with("bytes", -512), INDEX_FILE),
    "count as text": Damage(entry_with("samples", "many"), INDEX_FILE),
    "infinite count": Damage(entry_with("samples", float("inf")), INDEX_FILE),
    "more samples than bytes": Damage(entry_with("samples", 10**15), INDEX_FILE),
    "size beyond any disk": Damage(entry_with("bytes", 10**30), INDEX_FILE),
    "no sha256": Damage(entry_with("sha256", "../../x"), INDEX_FILE),
    "shard twice": Damage(entry_with("name", "000.tar"), INDEX_FILE),
    "shard climbs": _named("../x.tar"),
    "shard is absolute": _named("/etc/passwd"),
    "shard is a command": _named("pipe:cat /etc/passwd; x.tar"),
    "shard pipes": _named("| x.tar"),
    "shard elsewhere": _named("http://127.0.0.1:9/x.tar"),
    "shard with terminal codes": _named("\x1b[2Jx.tar"),
    "shard with half a letter": _named("\ud800.tar"),
    "shard without name": _named(".tar"),
    "train and val have other classes": Damage(_other_classes, VAL_INDEX),
    "no training samples": Damage(_without_samples("train"), INDEX_FILE),
    "no validation samples": Damage(_without_samples("val"), VAL_INDEX),
    "no val": Damage(lambda d: shutil.rmtree(d.root / "val"), ""),
    "train is a file": Damage(lambda d: _in_place_of_folder(d.root / "train"), INDEX_FILE),
}


def _in_place_of_folder(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("not a folder")


@pytest.mark.parametrize("damage", INDEX.values(), ids=INDEX)
def test_a_damaged_index_is_told_before_training(tmp_path: Path, damage: Damage) -> None:
    assert_refused(tmp_path, damage, "check")


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
