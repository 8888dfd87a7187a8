"""`mhla doctor`: one real run (two processes included), and each rule on made-up machines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest

from mhla_lightning.cli import doctor
from mhla_lightning.cli.doctor import devices, installation, processes
from mhla_lightning.cli.doctor.finding import Finding
from mhla_lightning.cli.main import main

OURS = {"mhla-lightning": "mhla_lightning.cli.main:lightning"}
SDK = {"lightning-sdk": "lightning_sdk.cli.entrypoint:main_cli"}


def test_doctor_runs_here_and_finds_nothing_broken(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MHLA_RUNS", str(tmp_path / "runs"))
    assert main(["doctor", "--json", str(tmp_path / "doctor.json")]) == 0
    rows = {row["check"]: row for row in json.loads((tmp_path / "doctor.json").read_text())["rows"]}
    shown = capsys.readouterr().out
    assert list(rows) == list(doctor.CHECKS)
    assert all(name in shown for name in rows)
    assert "all-reduce over 2 processes is right" in rows["two processes"]["detail"]
    assert f"torch {installation.installed('torch')}" in rows["packages"]["detail"]
    assert not (tmp_path / "runs").exists(), "doctor only looks"


def test_doctor_exits_1_when_a_check_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> Finding:
        raise OSError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(doctor, "CHECKS", {"fine": lambda: Finding("warn", "[not] quite"), "broken": broken})
    assert main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert "OSError: libcudart.so.13" in shown
    assert "[not] quite" in shown


@pytest.mark.parametrize("package", ["lightning", "pytorch-lightning"])
@pytest.mark.parametrize(
    ("number", "status"),
    [("2.6.1", "ok"), ("2.6.2", "fail"), ("2.6.3", "fail"), ("2.6.6", "ok"), (None, "ok")],
)
def test_compromised_releases(
    package: str, number: str | None, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installation, "installed", lambda name: number if name == package else None)
    finding = installation.compromised()
    assert finding.status == status
    assert status == "ok" or f"{package} {number}" in finding.detail


@pytest.mark.parametrize(
    ("number", "status", "word"),
    [
        (None, "fail", "not installed: timm"),
        ("1.0.2", "warn", "timm 1.0.2 (needs"),
        ("1.0.40", "ok", "timm 1.0.40"),
        ("1.1.0.dev0", "ok", "timm 1.1.0.dev0"),
    ],
)
def test_versions_against_what_is_asked_for(
    number: str | None, status: str, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installation, "installed", lambda name: number)
    wanted = ["timm>=1.0.31,<2", "mlxtend>=0.25; extra == 'demo'", "deepspeed>=9; sys_platform == 'nowhere'"]
    finding = installation.compare_versions(wanted)
    assert finding.status == status
    assert word in finding.detail


@pytest.mark.parametrize(
    ("script", "claims", "status", "word"),
    [
        ("from mhla_lightning.cli.main import lightning", OURS, "ok", "belongs to mhla-lightning"),
        ("from mhla_lightning.cli.main import lightning", SDK | OURS, "ok", "passed on to it"),
        ("from lightning_sdk.cli.entrypoint import main_cli", OURS | SDK, "warn", "belongs to lightning-sdk"),
        ("from fabric.cli import main", OURS, "warn", "not known here"),
        ("", {}, "warn", "`mhla run` always works"),
    ],
    ids=["ours", "ours, sdk before", "sdk came later", "someone else", "nobody"],
)
def test_who_owns_the_lightning_command(script: str, claims: dict[str, str], status: str, word: str) -> None:
    finding = installation.lightning_owner("/env/bin/lightning", script, claims)
    assert finding.status == status
    assert word in finding.detail


def test_commands_on_path(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    assert installation.command_here("mhla", None, [tmp_path]).status == "warn"
    assert "activate this environment" in installation.command_here("mhla", None, [tmp_path]).detail
    assert installation.command_here("mhla", str(tmp_path / "mhla"), [tmp_path / "link"]).status == "ok"
    assert "another Python" in installation.command_here("mhla", "/elsewhere/bin/mhla", [tmp_path]).detail


def test_commands_of_this_environment_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    scripts = sysconfig.get_path("scripts")
    if not (Path(scripts) / "lightning").exists():
        pytest.skip("the package is not installed here")
    monkeypatch.setenv("PATH", f"{scripts}{os.pathsep}{os.environ['PATH']}")
    assert installation.mhla_command() == Finding("ok", str(Path(scripts) / "mhla"))
    assert installation.lightning_command().detail.startswith(str(Path(scripts) / "lightning"))


def test_extras_name_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "installed", lambda name: "0.25" if name == "mlxtend" else None)
    finding = installation.extras()
    assert finding.status == "ok"
    assert "demo: mlxtend 0.25; diffusion: not installed" in finding.detail


def test_more_threads_than_cores_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "usable_cores", lambda: 0)
    assert devices.processor().status == "warn"


def test_little_shared_memory_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices.shutil, "disk_usage", lambda path: SimpleNamespace(free=64 * 2**20))
    assert devices.memory().status == "warn"


def test_a_runs_folder_that_cannot_be_written_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(dir: Path) -> None:  # noqa: A002  (the name that tempfile uses)
        raise PermissionError(13, "Permission denied")

    monkeypatch.setenv("MHLA_RUNS", str(tmp_path))
    monkeypatch.setattr(devices.tempfile, "TemporaryFile", refuse)
    assert devices.runs_folder() == Finding(
        "fail", f"{tmp_path} cannot be written: Permission denied; choose another with --runs or $MHLA_RUNS"
    )


def test_a_full_disk_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**6))
    monkeypatch.setenv("MHLA_RUNS", str(tmp_path))
    assert devices.runs_folder().status == "warn"


@pytest.mark.parametrize(
    "outputs", [["3.0\n", "1.0\n"], ["3.0\n", ""], ["", ""]], ids=["wrong sum", "one died", "both died"]
)
def test_a_wrong_sum_fails_with_the_last_words(outputs: list[str]) -> None:
    finding = processes.judge(outputs, ["", "Traceback\nRuntimeError: no interface"], 1.0)
    assert finding.status == "fail"
    assert "RuntimeError: no interface" in finding.detail


def test_processes_that_hang_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "LIMIT", 0.5)
    monkeypatch.setattr(processes, "_CODE", "import time; time.sleep(60)")
    finding = processes.two_processes()
    assert finding.status == "fail"
    assert "within" in finding.detail


def test_doctor_help_needs_no_torch() -> None:
    code = (
        "import sys, mhla_lightning.cli.doctor, mhla_lightning.cli.compare; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
