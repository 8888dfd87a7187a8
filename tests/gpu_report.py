"""Run everything that needs a GPU and write what came out: `make gpu`.

    python -m tests.gpu_report [--folder gpu-report]

The tests marked `gpu` run first, then the benches. `report.md` and `report.json` hold both. The packages that
are there are used; what cannot run without another is one line of the report.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "triton", "lightning", "deepspeed", "flash-linear-attention")
TESTS_SECONDS, BENCH_SECONDS = 400, 120  # limits; the whole is to end within ten minutes
WORKERS = 4  # processes of tests where pytest-xdist is there: most of the time goes into compiling kernels
BENCHES = {
    "kernels": ["kernels", "--measure"],
    "attention": ["attention", "--slope-to", "0"],
    "causal attention": [
        *("attention", "--causal", "--heads", "4", "--dim", "128", "--batch", "16"),
        *("--chunk-size", "64", "--tokens", "2048", "8192"),
    ],
    "decode": ["decode", "--tokens", "64"],
}
"""Name -> arguments of `mhla bench`."""


@dataclass(frozen=True)
class Outcome:
    """A test's or a bench's end.

    Attributes:
        name: of the test with its file, or of the bench.
        outcome: `passed`, `failed` or `skipped`.
        seconds: that it took.
        reason: the first line of what failed, or why it was skipped; empty where it passed.
    """

    name: str
    outcome: str
    seconds: float
    reason: str = ""


def gpu_tests() -> list[str]:
    """Return the files with tests marked `gpu`: other files may need packages that are not there."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(path.relative_to(ROOT)) for path in files if "pytest.mark.gpu" in path.read_text()]


def run_tests(folder: Path) -> list[Outcome]:
    """Run the tests marked `gpu`; warnings of other versions of a package are no failure here."""
    if find_spec("pytest") is None:
        return [Outcome("all tests", "skipped", 0.0, "pytest is not installed")]
    target = folder / "tests.xml"
    target.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-W", "default", f"--junitxml={target}"]
    command += ["--continue-on-collection-errors", "-p", "no:cacheprovider"]
    if find_spec("xdist") is not None and (os.cpu_count() or 1) >= 2 * WORKERS:
        command += ["-n", str(WORKERS)]
    began = time.monotonic()
    late = []
    with subprocess.Popen([*command, *gpu_tests()], cwd=ROOT) as tests:
        try:
            tests.wait(TESTS_SECONDS)
        except subprocess.TimeoutExpired:
            late = [Outcome("all tests", "failed", TESTS_SECONDS, f"stopped after {TESTS_SECONDS} s")]
            _interrupt(tests)
    if not target.is_file():
        return [*late, Outcome("all tests", "failed", time.monotonic() - began, "pytest wrote no results")]
    return [*outcomes(target), *late]


def _interrupt(tests: subprocess.Popen[bytes]) -> None:
    """Stop pytest so that it writes the results of what it has run."""
    tests.send_signal(signal.SIGINT)
    try:
        tests.wait(30)
    except subprocess.TimeoutExpired:
        tests.kill()


def outcomes(junit: Path) -> list[Outcome]:
    """Return the tests of pytest's JUnit file."""
    found = []
    for case in ElementTree.parse(junit).getroot().iter("testcase"):
        name = f"{case.get('classname', '')}::{case.get('name', '')}".removeprefix("::")
        outcome, reason = "passed", ""
        for tag in ("failure", "error", "skipped"):
            if (node := case.find(tag)) is not None:
                outcome = "skipped" if tag == "skipped" else "failed"
                reason = _first_line(node.get("message") or node.text or tag)
        found.append(Outcome(name, outcome, float(case.get("time", 0)), reason))
    return found


def run_benches(folder: Path) -> tuple[dict[str, Any], list[Outcome]]:
    """Run the benches; return what each measured by name, and how each ended."""
    measured: dict[str, Any] = {}
    ends = []
    for name, arguments in BENCHES.items():
        target = folder / f"{name.replace(' ', '_')}.json"
        target.unlink(missing_ok=True)
        command = [sys.executable, "-m", "mhla_lightning", "bench", *arguments, "--json", str(target)]
        began = time.monotonic()
        try:
            ended = subprocess.run(
                command, cwd=ROOT, timeout=BENCH_SECONDS, stderr=subprocess.PIPE, text=True, check=False
            )
            reason = _first_line(ended.stderr.strip().rpartition("\n")[2]) if ended.returncode else ""
        except subprocess.TimeoutExpired:
            reason = f"not done after {BENCH_SECONDS} s"
        if not reason and target.is_file():
            measured[name] = json.loads(target.read_text())
        elif not reason:
            reason = "it wrote no results"
        outcome = "failed" if reason else "passed"
        ends.append(Outcome(f"bench {name}", outcome, time.monotonic() - began, reason))
    return measured, ends


def _first_line(text: str) -> str:
    return " ".join(text.strip().splitlines()[:1])[:300]


def not_run(ends: Sequence[Outcome]) -> str:
    """Return one line: how many could not run, by reason."""
    reasons = Counter(end.reason for end in ends if end.outcome == "skipped")
    said = [f"{count} because {reason}" for reason, count in reasons.most_common()]
    return f"not run: {'; '.join(said)}" if said else "not run: nothing, all ran"


def write_report(
    folder: Path, machine: Mapping[str, Any], ends: Sequence[Outcome], measured: Mapping[str, Any]
) -> None:
    """Write report.json and report.md.

    Args:
        folder: of both files.
        machine: facts by name.
        ends: of tests and benches.
        measured: results of the benches by name, as their JSON files hold them.
    """
    whole = {"machine": machine, "ends": [asdict(end) for end in ends], "measured": measured}
    (folder / "report.json").write_text(json.dumps(whole, indent=1) + "\n")
    counts = Counter(end.outcome for end in ends)
    lines = ["# make gpu", "", *(f"- {name}: {value}" for name, value in machine.items())]
    lines += [f"- {', '.join(f'{counts[what]} {what}' for what in ('passed', 'failed', 'skipped'))}"]
    lines += [f"- {not_run(ends)}"]
    failed = [[end.name, end.reason] for end in ends if end.outcome == "failed"]
    lines += _section("Failed", ["test", "reason"], failed)
    kernels = measured.get("kernels", {}).get("measured", [])
    lines += _section(
        "One layer's operator, forward and backward in bf16, milliseconds",
        ["case", "form", "Triton", "modelled", "torch", "modelled", "FlashAttention", "modelled"],
        [_kernel_row(row) for row in kernels],
    )
    for name in ("attention", "causal attention"):
        headings = ["tokens", "operator", "forward ms", "step ms", "step modelled ms", "runs"]
        rows = [_attention_row(row) for row in measured.get(name, {}).get("rows", [])]
        lines += _section(f"mhla bench {name}", headings, rows)
    decode = measured.get("decode", {}).get("rows", [])
    headings = ["operator", "position", "ms a token", "ms as a CUDA graph", "graph"]
    lines += _section("mhla bench decode", headings, [_decode_row(row) for row in decode])
    slowest = sorted(ends, key=lambda end: -end.seconds)[:10]
    rows = [[end.name, f"{end.seconds:.1f}"] for end in slowest]
    lines += _section("Slowest", ["test", "seconds"], rows)
    (folder / "report.md").write_text("\n".join(lines) + "\n")


def _section(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table, none where it has no rows."""
    if not rows:
        return []
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    table = [headings, ["---"] * len(headings), *cells]
    return ["", f"## {title}", "", *(f"| {' | '.join(row)} |" for row in table)]


def _kernel_row(row: Mapping[str, Any]) -> list[str]:
    cells = [row["case"], row["form"]]
    for path in ("triton", "torch", "flash"):
        cells += [_number(row[f"{path}_ms"]), _number(row.get(f"{path}_modelled_ms"))]
    return cells


def _attention_row(row: Mapping[str, Any]) -> list[str]:
    times = [row.get(f"{key}_seconds") for key in ("forward", "step", "step_modelled")]
    shown = [_number(None if seconds is None else 1e3 * seconds) for seconds in times]
    return [f"{row['tokens']:,}", row["operator"], *shown, row.get("softmax", row.get("step_runs", "-"))]


def _decode_row(row: Mapping[str, Any]) -> list[str]:
    graph = row.get("graph_seconds_per_token")
    shown = [_number(1e3 * row["seconds_per_token"]), _number(None if graph is None else 1e3 * graph)]
    return [row["operator"], f"{row['position']:,}", *shown, row.get("graph", "-")]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all and write the report; 1 where something failed or there is no CUDA device."""
    parser = argparse.ArgumentParser(prog="make gpu", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "gpu-report", help="default: %(default)s")
    folder = parser.parse_args(arguments).folder.absolute()
    if find_spec("torch") is None:
        print("make gpu: torch is not installed here, so nothing was run", file=sys.stderr)
        return 1
    import torch

    if not torch.cuda.is_available():
        print(
            f"make gpu: torch {torch.__version__} sees no CUDA device here, so nothing was run",
            file=sys.stderr,
        )
        return 1
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    machine = {"GPU": torch.cuda.get_device_name(), **{package: _version(package) for package in PACKAGES}}
    ends = run_tests(folder)
    measured, benches = run_benches(folder)
    machine["seconds"] = f"{time.monotonic() - began:.0f}"
    write_report(folder, machine, [*ends, *benches], measured)
    print(not_run([*ends, *benches]))
    print(f"make gpu: {folder / 'report.md'} and report.json, after {machine['seconds']} s")
    return int(any(end.outcome == "failed" for end in [*ends, *benches]))


if __name__ == "__main__":
    sys.exit(main())
