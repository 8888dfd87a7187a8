"""Locks, metrics and messages on a full disk, after a power cut, and with names of any length."""

from __future__ import annotations

import io
import json
import os
import socket
import sys
from pathlib import Path

import pytest

from mhla_lightning.cli.main import main
from mhla_lightning.cli.numbers import parse_ranges
from mhla_lightning.errors import UserError
from mhla_lightning.runs import lock as locks
from mhla_lightning.runs.disk_errors import disk_errors, disk_problem
from mhla_lightning.runs.folder import (
    RunFolder,
    check_run_id,
    default_run_id,
    find_runs,
    overwrite_json,
    read_lines,
    read_metrics,
    read_object,
)
from mhla_lightning.runs.lock import check_held, hold, is_held
from mhla_lightning.runs.logger import keep_until
from tests.helpers.errors import refused
from tests.helpers.written_files import DAMAGES

FULL = OSError(28, "No space left on device")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "_WRITING", 0.1)


@pytest.mark.parametrize("content", [b"", b'{"host": "he', bytes(80), b"\xff\xfe", b"[1, 2]"])
@pytest.mark.usefixtures("quick")
def test_a_lock_without_an_owner_is_taken_over(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "lock").write_bytes(content)
    assert not is_held(tmp_path)
    with hold(tmp_path):
        assert read_object(tmp_path / "lock")["pid"] == os.getpid()
        assert is_held(tmp_path)
        (tmp_path / "lock").write_bytes(content)  # damaged meanwhile: no other process has the run
        check_held(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_lock_of_a_living_process_holds(tmp_path: Path) -> None:
    with hold(tmp_path), refused(str(tmp_path)), hold(tmp_path):
        pass
    held = {"host": f"not-{socket.gethostname()}", "pid": 1, "started": "1", "job": None}
    (tmp_path / "lock").write_text(json.dumps(held))
    with refused(str(tmp_path)), hold(tmp_path):
        pass


def test_a_full_disk_leaves_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, text: str) -> None:
        self.touch()
        raise FULL

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"), hold(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_lock_where_files_have_no_second_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with hold(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == ["lock"]
        with refused(str(tmp_path)), hold(tmp_path):
            pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_metrics_keep_their_whole_lines(tmp_path: Path, how: str) -> None:
    lines = [json.dumps({"step": step, "tag": "train/loss", "value": 0.1 * step}) for step in range(1, 10)]
    file = tmp_path / "metrics.jsonl"
    file.write_text("\n".join(lines) + "\n")
    file.write_bytes(DAMAGES[how](file.read_bytes()))
    whole = {"truncated": 6, "empty": 0, "zero tail": 6, "garbage tail": 9}[how]
    rows = [(step, 0.1 * step) for step in range(1, whole + 1)]
    assert read_metrics(file).get("train/loss", []) == rows
    keep_until(file, 4)
    assert file.read_text() == "".join(f"{line}\n" for line in lines[: min(4, whole)])
    with file.open("a") as more:
        more.write(lines[4] + "\n")  # nothing torn is left that would swallow the next line
    assert len(read_lines(file)) == min(4, whole) + 1


def test_an_error_of_the_disk_is_found_behind_others(tmp_path: Path) -> None:
    try:
        try:
            raise FULL
        except OSError as cause:
            raise ValueError("you tried to log 1.0, which is not supported") from cause
    except ValueError as found:
        wrapped = found
    assert disk_problem(wrapped, tmp_path) == f"the disk of {tmp_path} is full"
    assert disk_problem(OSError(2, "No such file", "x"), tmp_path) is None
    with (
        pytest.raises(UserError, match="is full; there is no earlier checkpoint") as error,
        disk_errors(tmp_path),
    ):
        raise wrapped
    assert error.value.key == str(tmp_path)
    with pytest.raises(ZeroDivisionError), disk_errors(tmp_path):
        raise ZeroDivisionError


def test_a_file_is_written_over_where_no_second_one_fits(tmp_path: Path) -> None:
    file = tmp_path / "progress.json"
    overwrite_json(file, {"state": "preempted"})
    assert not file.exists()
    file.write_text(json.dumps({"state": "running", "much": "x" * 300}))
    overwrite_json(file, {"state": "preempted"})
    assert json.loads(file.read_text()) == {"state": "preempted"}


@pytest.mark.parametrize(
    "name", ["a" * 201, "a" * 300, "a/b", ".a", "..", "-a", "é", "日本", "a b", "", "a\n"]
)
def test_names_that_are_no_run_id(name: str) -> None:
    with refused("run_id") as error:
        check_run_id(name)
    assert len(str(error.value)) < 250


def test_names_of_any_length(tmp_path: Path) -> None:
    assert check_run_id("a" * 200) == "a" * 200
    assert len(os.fsencode(default_run_id(f"{'é' * 240}.yaml", {}))) <= 200
    with refused("run"):
        find_runs("a" * 300, tmp_path)
    assert not RunFolder(tmp_path / "a").finished()


@pytest.mark.parametrize("verb", ["generate", "export", "sample", "status", "logs", "cancel", "resume"])
def test_a_long_name_of_a_run(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--to", str(tmp_path / "x")] if verb == "export" else []
    assert main([verb, "a" * 300, "--runs", str(tmp_path), *more]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")


def test_a_long_path_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (
        ["run", "b" * 300 + ".yaml"],
        ["data", "verify", str(tmp_path / ("b" * 300))],
        ["data", "pack", str(tmp_path), "--to", str(tmp_path / ("b" * 300))],
        ["plan", "language/lm_tiny_mhla_stdlib_cpu", "--json", str(tmp_path / ("b" * 300))],
    ):
        assert main(command) == 2, command
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_text_on_any_terminal(encoding: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A terminal gets an escape for what it cannot show, also for bytes that are no UTF-8."""
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(shown, encoding=encoding))
    name = "caf\u00e9-\U0001f389-\udcff"
    assert main(["status", name, "--runs", str(tmp_path)]) == 2
    sys.stderr.flush()
    text = shown.getvalue().decode(encoding)
    assert "\\udcff" in text
    assert ("\U0001f389" in text) == (encoding == "utf-8")
    assert ("\u00e9" in text) == (encoding != "ascii")


@pytest.mark.parametrize(
    ("text", "most", "found"),
    [("0-2,7", 9, [0, 1, 2, 7]), ("3", 1, [3]), (" 1 , 2", 2, [1, 2]), ("0-999", 1000, [*range(1000)])],
)
def test_ranges(text: str, most: int, found: list[int]) -> None:
    assert parse_ranges("classes", text, "classes", most) == found


@pytest.mark.parametrize(
    "text",
    ["0-99999999999999", "0-100000000", "0-50,0-50", "9" * 5000, "2-1", "", "1,,2", "x", "-1", "1-", "١"],
)
def test_ranges_of_any_size_are_refused(text: str) -> None:
    with refused("classes") as error:
        parse_ranges("classes", text, "classes", 100)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (["sample", "x", "--classes", "0-99999999999999"], "--classes"),
        (["sample", "x", "--n", "99999999999999"], "--n"),
        (["sample", "x", "--processes", "100000"], "--processes"),
        (
            ["submit", "language/lm_tiny_mhla_stdlib_cpu", "--profile", "cpu", "--array", "0-100000000"],
            "--array",
        ),
    ],
)
def test_a_giant_count_is_one_sentence(
    command: list[str], option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {option}: ")
    assert "at most" in line
