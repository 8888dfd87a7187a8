"""The walk through users' folders: links, loops, broken links, splits by other names."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
from PIL import Image

from mhla_lightning.data.prepare.clips.inputs import open_videos
from mhla_lightning.data.prepare.pack import PackOptions, pack
from mhla_lightning.data.prepare.sources.listing import list_classes
from mhla_lightning.data.prepare.text.documents import Files
from mhla_lightning.data.prepare.text.inputs import open_inputs
from mhla_lightning.data.prepare.walking import files_below, walk
from mhla_lightning.errors import DataError
from tests.helpers.errors import refused


def _files(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text(f"the text of {name}\n")
    return folder


def _images(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True)
    for number in range(count):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(folder / f"{folder.parent.name}{number}.png")
    return folder


def _names(paths: list[Path], root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in paths]


def test_linked_folders_of_images_are_packed(tmp_path: Path) -> None:
    for label in "ab":
        _images(tmp_path / "images" / label, 4)
        _images(tmp_path / "store" / label, 10)
        (tmp_path / "images" / label / "part2").symlink_to(tmp_path / "store" / label)
    indices = pack(tmp_path / "images", tmp_path / "out", PackOptions(val=2))
    assert sum(index.samples for index in indices.values()) == 28


def test_linked_folders_of_text_and_films_are_read(tmp_path: Path) -> None:
    _files(tmp_path / "in", "a.txt", "b.mp4")
    _files(tmp_path / "else" / "deep", "c.txt", "d.mp4", "e.MP4")
    (tmp_path / "in" / "more").symlink_to(tmp_path / "else")
    groups = [group for found in open_inputs([str(tmp_path / "in")]).sources for group in found.groups(2**20)]
    texts = [path for group in groups if isinstance(group, Files) for path in group.paths]
    names = ["a.txt", "b.mp4", "more/deep/c.txt", "more/deep/d.mp4", "more/deep/e.MP4"]
    assert _names(texts, tmp_path / "in") == names
    films = [film.path for film in open_videos(tmp_path / "in", need_captions=False)]
    assert _names(films, tmp_path / "in") == ["b.mp4", "more/deep/d.mp4", "more/deep/e.MP4"]


def test_loops_end_and_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = _files(tmp_path / "above" / "root", "a.txt")
    _files(root / "sub", "b.txt")
    _files(tmp_path / "above" / "other", "outside.txt")
    (root / "sub" / "self").symlink_to(root / "sub")
    (root / "sub" / "up").symlink_to("..")
    (root / "top").symlink_to(tmp_path / "above")
    (root / "chain").symlink_to(tmp_path / "chained")
    _files(tmp_path / "chained", "c.txt")
    (tmp_path / "chained" / "back").symlink_to(root)
    with caplog.at_level(logging.WARNING):
        assert _names(files_below(root), root) == ["a.txt", "chain/c.txt", "sub/b.txt"]
    (message,) = caplog.messages
    assert "4 linked folders are left out" in message
    assert _names(walk(root).repeated, root) == ["chain/back", "sub/self", "sub/up", "top"]


def test_a_folder_of_two_names_is_read_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Under the name that is really there, else under the first."""
    root = _files(tmp_path / "root", "a.txt")
    _files(root / "real", "b.txt")
    _files(tmp_path / "store", "c.txt")
    _files(tmp_path / "store" / "part", "d.txt")
    (root / "first").symlink_to(root / "real")
    (root / "one").symlink_to(tmp_path / "store" / "part")
    (root / "two").symlink_to(tmp_path / "store")
    (root / "zwei").symlink_to(tmp_path / "store")
    with caplog.at_level(logging.WARNING):
        assert _names(files_below(root), root) == ["a.txt", "one/d.txt", "real/b.txt", "two/c.txt"]
    assert "3 linked folders" in caplog.text


def test_linked_files_and_a_linked_root_are_read(tmp_path: Path) -> None:
    store = _files(tmp_path / "store", "a.txt")
    _files(store / "sub", "b.txt")
    (store / "again.txt").symlink_to(store / "a.txt")
    (tmp_path / "root").symlink_to(store)
    root = tmp_path / "root"
    assert _names(files_below(root), root) == ["a.txt", "again.txt", "sub/b.txt"]


def test_broken_links_are_counted_and_refused(tmp_path: Path) -> None:
    root = _files(tmp_path / "root", "a.txt")
    for name in ("gone", "lost.txt", ".hidden"):
        (root / name).symlink_to(tmp_path / "nowhere")
    (root / "ring.txt").symlink_to(root / "ring.txt")
    with refused(str(root / "gone"), DataError) as error:
        files_below(root)
    assert "2 others" in error.value.reason
    assert _names(walk(root, lambda name: name.endswith(".mp4")).broken, root) == ["gone"]
    for number in range(2):
        _images(tmp_path / "images" / str(number), 2)
    (tmp_path / "images" / "2").symlink_to(tmp_path / "nowhere")
    with refused(str(tmp_path / "images" / "2"), DataError) as error:
        list_classes(tmp_path / "images", "image.jpg")
    assert "link to nothing" in error.value.reason


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """os.walk would pass over it without a word."""
    root = _files(tmp_path / "root", "a.txt")
    _files(root / "locked", "b.txt")

    listed = os.scandir

    def scandir(folder: Path) -> object:
        if folder.name == "locked":
            raise PermissionError(13, "Permission denied")
        return listed(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    with refused(str(root / "locked"), DataError):
        files_below(root)


def test_pipes_are_left_out_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = _files(tmp_path / "root", "a.txt")
    os.mkfifo(root / "pipe")
    with caplog.at_level(logging.WARNING):
        assert _names(files_below(root), root) == ["a.txt"]
    assert "pipe" in caplog.text


@pytest.mark.parametrize(
    ("folders", "odd"),
    [
        (("train", "validation"), "validation"),
        (("train", "Test"), "Test"),
        (("Train", "Val"), "Train"),
        (("training", "testing"), "testing"),
    ],
)
def test_splits_by_other_names_are_no_classes(tmp_path: Path, folders: tuple[str, ...], odd: str) -> None:
    for split in folders:
        _images(tmp_path / "source" / split / "cat", 2)
    with refused(str(tmp_path / "source" / odd), DataError) as error:
        pack(tmp_path / "source", tmp_path / "out")
    assert "rename it to" in error.value.reason


def test_classes_may_be_called_like_splits(tmp_path: Path) -> None:
    for name in ("dev", "training", "cat"):
        _images(tmp_path / "source" / name, 2)
    assert list_classes(tmp_path / "source", "image.jpg").classes == ("cat", "dev", "training")


def test_a_folder_beside_the_splits_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for split in ("train", "val", "unlabelled"):
        _images(tmp_path / "source" / split / "cat", 2)
    with caplog.at_level(logging.WARNING):
        assert sorted(list_classes(tmp_path / "source", "image.jpg").files) == ["train", "val"]
    assert "unlabelled is left out" in caplog.text
