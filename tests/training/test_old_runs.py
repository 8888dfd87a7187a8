"""Runs of an earlier layout of the package and its recipe keys resume by the same command."""

from __future__ import annotations

import json
import re
import tarfile
from pathlib import Path

import pytest
import torch

from tests.helpers.ranks import Nursery

RUNS = Path(__file__).parents[1] / "golden" / "runs"
SPEEDS = re.compile(r"per_second|train/time_")


@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_a_run_of_an_earlier_version_resumes_bit_for_bit(
    strategy: str, tmp_path: Path, nursery: Nursery
) -> None:
    """Two ranks, stopped by SIGTERM after step 5 of 12; the curve of an unbroken run is recorded beside it.

    The numbers are compared exactly on the processor and torch that made them, else to 1e-5.
    """
    with tarfile.open(RUNS / f"{strategy}.tar.xz") as archive:
        if hasattr(tarfile, "data_filter"):  # since Python 3.11.4
            archive.extractall(tmp_path, filter="data")
        else:
            archive.extractall(tmp_path)
    expected = json.loads((tmp_path / "expected.json").read_text())
    (run,) = (tmp_path / "runs").iterdir()

    command = ["run", "tiny.yaml", "--runs", "runs", "--trainer.devices", "2"]
    command += ["--trainer.strategy", strategy, "--checkpoint.asynchronous", "false"]
    output = nursery.run(2, command, tmp_path)

    assert list((tmp_path / "runs").iterdir()) == [run], "the same recipe has another run id"
    assert expected["checkpoint"] in output
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    curve = [[line["step"], line["tag"], line["value"]] for line in lines if not SPEEDS.search(line["tag"])]
    # Versions before 0.2.0 measured top-5 of four classes, which is always 1.
    curve, kept = (
        [row for row in rows if not row[1].endswith("/top5")] for rows in (curve, expected["curve"])
    )
    assert [row[:2] for row in curve] == [row[:2] for row in kept]
    processor = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    same = processor is not None and processor[1] == expected["processor"]
    tolerance = 0.0 if same and torch.__version__ == expected["torch"] else 1e-5
    values = [row[2] for row in curve]
    assert values == pytest.approx([row[2] for row in kept], rel=tolerance, abs=tolerance)
