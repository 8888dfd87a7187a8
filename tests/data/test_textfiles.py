"""One reader of the texts that users hand in: byte order marks, UTF-16, and Latin-1 with its line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mhla_lightning.cli import generate
from mhla_lightning.cli.data import index
from mhla_lightning.config.recipes import read_yaml
from mhla_lightning.data.kinds.captions import caption_of
from mhla_lightning.data.prepare.clips.inputs import open_videos
from mhla_lightning.data.skips import BadSample
from mhla_lightning.errors import DataError, UserError
from mhla_lightning.inference.diffusion.prompts import read_prompts
from mhla_lightning.textfiles import decode, read_text, split_lines
from tests.helpers.errors import refused

ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]


def written(path: Path, text: str, encoding: str) -> Path:
    """A file in an encoding, with a mark where it needs one."""
    mark = "\ufeff" if encoding[-3:] in ("-le", "-be") else ""
    path.write_bytes(f"{mark}{text}".encode(encoding))
    return path


def captions_beside(path: Path, text: str, encoding: str) -> list[str]:
    (path.parent / "a.mp4").touch()
    written(path.parent / "a.txt", text.splitlines()[0], encoding)
    return [video.caption for video in open_videos(path.parent)]


def captions_of_a_list(path: Path, text: str, encoding: str) -> list[str]:
    captions = text.splitlines()
    rows = [json.dumps({"file": f"{n}.mp4", "caption": one}) for n, one in enumerate(captions)]
    for number in range(len(captions)):
        (path.parent / f"{number}.mp4").touch()
    named = written(path.with_suffix(".jsonl"), "\r\n".join(rows), encoding)
    return [video.caption for video in open_videos(path.parent, named)]


def prompts(path: Path, text: str, encoding: str) -> list[str]:
    return [prompt.text for prompt in read_prompts(written(path, text, encoding))]


def prompts_of_json(path: Path, text: str, encoding: str) -> list[str]:
    rows = [{"prompt": one} for one in text.splitlines()]
    listed = written(path.with_suffix(".ndjson"), "\n".join(map(json.dumps, rows)), encoding)
    array = written(path.with_suffix(".json"), json.dumps(rows, indent=1), encoding)
    found = [prompt.text for prompt in read_prompts(listed)]
    assert [prompt.text for prompt in read_prompts(array)] == found
    assert generate._read(listed) == generate._read(array) == found
    return found


def prompts_of_text(path: Path, text: str, encoding: str) -> list[str]:
    return generate._read(written(path, text, encoding))


def classes(path: Path, text: str, encoding: str) -> list[str]:
    return list(index._classes(str(written(path, f"{text}\n", encoding))) or ())


def recipe(path: Path, text: str, encoding: str) -> list[str]:
    listed = "".join(f"- {line}\r\n" for line in text.splitlines())
    return list(read_yaml(written(path, listed, encoding)))


DOORS: dict[str, Callable[[Path, str, str], list[str]]] = {
    "captions beside": captions_beside,
    "captions of a list": captions_of_a_list,
    "prompts of samples": prompts,
    "prompts as JSON": prompts_of_json,
    "prompts of texts": prompts_of_text,
    "classes": classes,
    "recipes": recipe,
}


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
def test_every_door_reads_every_encoding(
    door: Callable[[Path, str, str], list[str]], encoding: str, tmp_path: Path
) -> None:
    wanted = ["a red car é"] if door is captions_beside else ["a red car é", "日本 🙂"]
    assert door(tmp_path / "file.txt", "\r\n".join(wanted), encoding) == wanted


KEYS: dict[Callable[[Path, str, str], list[str]], str] = {prompts_of_text: "prompts", classes: "classes"}


@pytest.mark.parametrize(
    "door", [captions_beside, prompts, prompts_of_text, classes, recipe], ids=lambda door: door.__name__
)
def test_every_door_refuses_latin_1_with_its_line(
    door: Callable[[Path, str, str], list[str]], tmp_path: Path
) -> None:
    text = "caf\xe9" if door is captions_beside else "good\ncaf\xe9"
    path = tmp_path / ("a.txt" if door is captions_beside else "file.txt")
    kind = DataError if door is captions_beside else UserError
    with refused(KEYS.get(door, str(path)), kind) as error:
        door(tmp_path / "file.txt", text, "latin-1")
    assert f"line {1 if door is captions_beside else 2} is no UTF-8 text (byte 0xE9)" in error.value.reason


def test_captions_that_are_empty_but_for_a_mark(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").touch()
    for content in (b"", b"\xef\xbb\xbf\r\n", "\ufeff \n".encode("utf-16-le")):
        (tmp_path / "a.txt").write_bytes(content)
        with refused(str(tmp_path / "a.mp4"), DataError) as error:
            open_videos(tmp_path)
        assert "has an empty caption" in error.value.reason


def test_captions_in_shards_of_others() -> None:
    sample: dict[str, Any] = {"__key__": "k", "__url__": "u"}
    assert caption_of(sample | {"txt": b"\xef\xbb\xbfa red car"}) == "a red car"
    with pytest.raises(BadSample):
        caption_of(sample | {"txt": b"caf\xe9"})


def test_lines_end_where_files_end_them() -> None:
    """Not at U+2028 or U+0085, which JSON holds inside a text; marks of joined files vanish."""
    assert split_lines("a\u2028b\x85c\r\nd\re\n\ufefff") == ["a\u2028b\x85c", "d", "e", "f"]


def test_what_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("one\ntwo".encode("utf-16-le"))  # without a mark
    with refused(str(path)) as error:
        read_text(path)
    assert "NUL" in error.value.reason
    path.write_bytes(b"\xff\xfea")
    with refused("key", DataError) as error:
        read_text(path, "key", kind=DataError)
    assert f"{path} line 1 is no UTF-16 text" in error.value.reason
    with refused(str(tmp_path / "none")):
        read_text(tmp_path / "none")
    with refused(str(path)):
        read_text(path, most=2)
    assert decode(b"") == decode(b"\xef\xbb\xbf") == ""
