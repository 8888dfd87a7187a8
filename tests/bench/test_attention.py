"""`mhla bench attention`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mhla_lightning.cli.main import main


def test_bench_attention_writes_rows_and_ratios(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mhla_lightning.bench.timing.GEMM_SIDE", 64)
    target = tmp_path / "bench.json"
    arguments = [
        "bench",
        "attention",
        "--tokens",
        "64",
        "128",
        "--slope-to",
        "0",
        "--heads",
        "2",
        "--dim",
        "8",
        "--blocks",
        "8",
        "--turns",
        "5",
    ]
    assert main([*arguments, "--json", str(target)]) == 0
    result = json.loads(target.read_text())
    assert [(row["tokens"], row["operator"]) for row in result["rows"]] == [
        (n, name) for n in (64, 128) for name in ("softmax", "linear", "mhla")
    ]
    assert all(row["forward_seconds"] > 0 and row["turns"] == 5 for row in result["rows"])
    keys = (
        "sdpa_over_mhla_forward",
        "sdpa_over_mhla_step",
        "mhla_over_linear_forward",
        "mhla_over_linear_step",
        "mhla_over_gemm_forward",
        "mhla_over_gemm_step",
    )
    assert set(keys) <= result["summary"].keys()


def test_bench_refuses_what_cannot_be_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "attention", "--turns", "2"]) == 2
    assert "--turns" in capsys.readouterr().err
    assert main(["bench", "attention", "--tokens", "100", "--blocks", "99", "--slope-to", "0"]) == 2
    assert "blocks" in capsys.readouterr().err
