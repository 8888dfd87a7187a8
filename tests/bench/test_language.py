"""`mhla bench attention --causal` and `mhla bench decode`: what is measured and how it is reported; never
how fast it was.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mhla_lightning.bench.decode_speed import build_model, decode_at
from mhla_lightning.cli.main import main
from mhla_lightning.planning.memory import peak_bytes


def test_causal_attention_is_measured_with_every_chunk_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mhla_lightning.bench.timing.GEMM_SIDE", 64)
    target = tmp_path / "bench.json"
    arguments = [
        "bench",
        "attention",
        "--causal",
        "--tokens",
        "64",
        "128",
        "--heads",
        "2",
        "--dim",
        "8",
        "--chunk-size",
        "16",
        "--turns",
        "5",
        "--slope-to",
        "0",
    ]
    assert main([*arguments, "--json", str(target)]) == 0
    result = json.loads(target.read_text())
    assert [(row["tokens"], row["operator"]) for row in result["rows"]] == [
        (n, name) for n in (64, 128) for name in ("softmax", "linear", "mhla")
    ]
    at = {(row["operator"], row["tokens"]): row for row in result["rows"]}
    chunks = 128 // 16
    assert at["mhla", 128]["flops_forward"] == 2 * 2 * (8 * 8 * (2 * 128 + chunks**2) + 128 * 16 * 16)
    assert at["softmax", 128]["flops_forward"] == 2 * 2 * 128 * 128 * 16
    assert {"sdpa_over_mhla_step", "mhla_over_linear_step", "mhla_over_gemm_step"} <= result["summary"].keys()


def test_peak_memory_is_that_of_the_largest_moment() -> None:
    mebibyte = 2**18

    def work() -> None:
        for _ in range(3):
            big = torch.zeros(4 * mebibyte)
            small = big[:mebibyte].clone()
            del big
            torch.zeros(mebibyte).add_(small)

    assert (
        peak_bytes(work, torch.device("cpu")) == 6 * 2**20
    )  # the large one, its copy, and the copy of the round before


def test_decode_rows_say_what_a_token_costs_and_what_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "decode.json"
    sizes = [
        "--positions",
        "130",
        "400",
        "--tokens",
        "4",
        "--layers",
        "1",
        "--embed-dim",
        "64",
        "--max-chunks",
        "2",
    ]
    assert main(["bench", "decode", *sizes, "--json", str(target)]) == 0
    result = json.loads(target.read_text())
    at = {(row["operator"], row["position"]): row for row in result["rows"]}
    assert set(at) == {(name, n) for name in ("mhla", "mhla_uncapped", "softmax") for n in (130, 400)}
    assert all(row["seconds_per_token"] > 0 for row in at.values())
    assert at["mhla", 130]["state_bytes"] == at["mhla", 400]["state_bytes"]
    assert at["mhla_uncapped", 130]["state_bytes"] < at["mhla_uncapped", 400]["state_bytes"]
    assert at["softmax", 130]["state_bytes"] < at["softmax", 400]["state_bytes"]
    wanted = {
        "mhla_400_over_130",
        "mhla_uncapped_400_over_130",
        "softmax_400_over_130",
        "softmax_over_mhla",
        "softmax_over_mhla_state_bytes",
    }
    assert wanted <= result["summary"].keys()


def test_decoding_takes_the_same_tokens_at_every_place() -> None:
    model = build_model(
        {"name": "mhla", "max_chunks": 3, "extrapolation": "shift"},
        {"depth": 1, "embed_dim": 64, "vocab_size": 32},
        torch.device("cpu"),
    )
    seen: list[list[int]] = []
    step = model.step

    def watched(tokens: torch.Tensor, state: object) -> object:
        seen.append(tokens.tolist())
        return step(tokens, state)  # type: ignore[arg-type]

    model.step = watched  # type: ignore[method-assign, assignment]
    places = decode_at("mhla", model, [10, 70], batch=2, tokens=3, turns=5)
    assert len(seen) == 2 * 3 * 5
    assert seen[::2] == seen[1::2]
    assert [len(place.seconds) for place in places] == [5, 5]


def test_what_cannot_be_measured_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "decode", "--positions", "64"]) == 2
    assert "--positions" in capsys.readouterr().err
    assert main(["bench", "attention", "--causal", "--chunk-size", "0"]) == 2
    assert "--chunk-size" in capsys.readouterr().err
