"""`make gpu`: what it collects, what it says without a GPU, and the report that it writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mhla_lightning.bench import timing
from mhla_lightning.cli.main import main as cli
from tests import gpu_report
from tests.gpu_report import Outcome

JUNIT = """<testsuites><testsuite name="pytest">
<testcase classname="tests.a.test_x" name="test_one[bf16]" time="1.5" />
<testcase classname="tests.a.test_x" name="test_two" time="0.5">
  <failure message="assert 1 &lt; 0&#10;more">x</failure></testcase>
<testcase classname="tests.b.test_y" name="test_three" time="0"><skipped message="no fla" /></testcase>
<testcase classname="tests.b.test_y" name="test_four" time="0"><skipped message="no fla" /></testcase>
<testcase classname="" name="tests.c.test_z" time="0">
  <error message="collection failure">No module named x</error></testcase>
</testsuite></testsuites>"""
KERNELS = {"case": "DeiT | T", "form": "dense", "triton_ms": 0.5, "torch_ms": 8.0, "flash_ms": 0.4}
DECODE = {"operator": "mhla", "position": 1024, "seconds_per_token": 2e-3, "graph": "eagerly; it waits"}


@pytest.mark.slow  # the collection of the whole suite finds what cannot be imported
def test_tests_for_a_gpu_are_collected() -> None:
    files = gpu_report.gpu_tests()
    for part in ("attention/test_kernels_gpu", "attention/test_fla", "strategies/test_one_gpu"):
        assert f"tests/{part}.py" in files
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--collect-only", "-p", "no:cacheprovider"]
    said = subprocess.run([*command, *files], cwd=gpu_report.ROOT, capture_output=True, text=True, check=True)
    for name in (
        "equal_float64",
        "a_gpu_learns",
        "in_less_memory",
        "one_by_one",
        "what_one_process_learns",
    ):
        assert name in said.stdout


def test_without_a_gpu_one_sentence_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_report.main(["--folder", str(tmp_path / "report")]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert "sees no CUDA device here" in said.err
    assert not (tmp_path / "report").exists()


def test_the_report_holds_what_it_is_given(tmp_path: Path) -> None:
    (tmp_path / "tests.xml").write_text(JUNIT)
    ends = gpu_report.outcomes(tmp_path / "tests.xml")
    assert [end.outcome for end in ends] == ["passed", "failed", "skipped", "skipped", "failed"]
    assert ends[1] == Outcome("tests.a.test_x::test_two", "failed", 0.5, "assert 1 < 0")
    line = "not run: 2 because no fla"
    assert gpu_report.not_run(ends) == line
    assert gpu_report.not_run(ends[:1]) == "not run: nothing, all ran"
    measured = {"kernels": {"measured": [KERNELS]}, "decode": {"rows": [DECODE]}}
    gpu_report.write_report(tmp_path, {"GPU": "H100"}, ends, measured)
    whole = json.loads((tmp_path / "report.json").read_text())
    assert whole["machine"] == {"GPU": "H100"}
    assert whole["measured"] == measured
    assert len(whole["ends"]) == 5
    text = (tmp_path / "report.md").read_text()
    for row in (
        "- GPU: H100",
        "- 1 passed, 2 failed, 2 skipped",
        f"- {line}",
        "| tests.a.test_x::test_two | assert 1 < 0 |",
        "| DeiT \\| T | dense | 0.500 | - | 8.000 | - | 0.400 | - |",
        "| mhla | 1,024 | 2.000 | - | eagerly; it waits |",
    ):
        assert row in text.splitlines()


def test_benches_that_fail_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a CPU `--measure` is refused, and a bench of tiny sizes works."""

    def run(command: list[str], **options: Any) -> Any:
        assert command[:3] == [sys.executable, "-m", "mhla_lightning"]
        code = cli(command[3:])
        return SimpleNamespace(returncode=code, stderr=capsys.readouterr().err)

    small = ["--tokens", "64", "--slope-to", "0", "--dim", "8", "--blocks", "8", "--turns", "5"]
    benches = {"kernels": ["kernels", "--measure"], "attention": ["attention", "--device", "cpu", *small]}
    monkeypatch.setattr(gpu_report, "BENCHES", benches)
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(timing, "GEMM_SIDE", 64)
    measured, ends = gpu_report.run_benches(tmp_path)
    assert list(measured) == ["attention"]
    assert [(end.name, end.outcome) for end in ends] == [
        ("bench kernels", "failed"),
        ("bench attention", "passed"),
    ]
    assert "there is no CUDA device here" in ends[0].reason
