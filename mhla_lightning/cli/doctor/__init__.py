"""Check this machine: versions, devices, commands, write access, processes.

Exit code 0 when nothing failed, 1 otherwise.

  mhla doctor
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable

from mhla_lightning.cli.doctor import devices, installation, processes
from mhla_lightning.cli.doctor.finding import Finding, Status
from mhla_lightning.cli.output import check_json, write_json

CHECKS: dict[str, Callable[[], Finding]] = {
    "python": installation.python,
    "packages": installation.packages,
    "compromised releases": installation.compromised,
    "extras": installation.extras,
    "plugins": installation.plugins,
    "command mhla": installation.mhla_command,
    "command lightning": installation.lightning_command,
    "processor": devices.processor,
    "C++ compiler": devices.compiler,
    "memory": devices.memory,
    "gpu": devices.gpu,
    "runs folder": devices.runs_folder,
    "two processes": processes.two_processes,
}
_STYLES: dict[Status, str] = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `mhla doctor`."""
    parser.add_argument("--json", metavar="FILE", help="write the table as JSON too")


def run(args: argparse.Namespace) -> int:
    """Carries out the verb; returns the exit code."""
    check_json(args.json)
    findings = _run_checks()
    _print_table(findings)
    if args.json is not None:
        rows = [
            {"check": name, "status": finding.status, "detail": finding.detail}
            for name, finding in findings.items()
        ]
        write_json(args.json, {"rows": rows})
    return int(any(finding.status == "fail" for finding in findings.values()))


def _run_checks() -> dict[str, Finding]:
    from rich.console import Console

    findings = {}
    with Console(stderr=True).status("checking") as status:
        for name, check in CHECKS.items():
            status.update(f"checking {name}")
            findings[name] = guarded(check)
    return findings


def guarded(check: Callable[[], Finding]) -> Finding:
    """A check's finding; a library that does not even load is a finding too."""
    try:
        return check()
    except (
        ImportError,
        AttributeError,
        OSError,
        RuntimeError,
        ValueError,
        subprocess.SubprocessError,
    ) as error:
        return Finding("fail", f"{type(error).__name__}: {' '.join(str(error).split())}")


def _print_table(findings: dict[str, Finding]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("check", "status", "finding")
    for name, finding in findings.items():
        table.add_row(name, Text(finding.status, style=_STYLES[finding.status]), Text(finding.detail))
    Console(width=None if sys.stdout.isatty() else 240).print(table)
