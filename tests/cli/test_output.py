"""Files and folders that a verb is to write are checked before its work."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mhla_lightning.cli.output import check_writable, make_folder
from mhla_lightning.runs.folder import check_folder
from tests.helpers.errors import refused


def test_a_folder_is_checked_and_not_made(tmp_path: Path) -> None:
    deep = tmp_path / "new" / "deep"
    assert check_folder("to", deep) == deep
    assert not deep.parent.exists()
    make_folder("to", deep)
    assert check_folder("to", deep).is_dir()


def test_a_file_in_the_place_of_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with refused("to"):
            check_folder("to", folder)


def test_a_folder_that_nobody_can_make_is_refused() -> None:
    with refused("to"):
        make_folder("to", Path("/proc/mhla"))


def test_what_this_user_may_not_write_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there.json").touch()
    if os.geteuid() == 0:  # root may write everywhere; another user's answer is pretended
        monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    else:
        (tmp_path / "there.json").chmod(0o400)
        tmp_path.chmod(0o500)
    with refused("to"):
        check_folder("to", tmp_path / "new")
    for name in ("new.json", "there.json"):
        with refused("json"):
            check_writable("json", str(tmp_path / name))


def test_a_file_needs_a_folder_and_is_none(tmp_path: Path) -> None:
    for file in (tmp_path, tmp_path / "no" / "x.json"):
        with refused("json"):
            check_writable("json", str(file))
    check_writable("json", str(tmp_path / "x.json"))
    check_writable("json", None)
