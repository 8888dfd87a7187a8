"""`mhla bench attention --causal` and `mhla bench decode`: what is measured and how it is reported; never
how fast it was.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mhla_lightning.attention.baselines.causal_softmax import KeyValueCache
from mhla_lightning.backbones import ModelState
from mhla_lightning.bench import decode_speed
from mhla_lightning.bench.decode_speed import build_model, decode_at, kinds, skipped, state_at, timed
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


ENTRIES: dict[str, dict[str, Any]] = {
    "capped": {"name": "mhla", "max_chunks": 3, "extrapolation": "shift"},
    "uncapped": {"name": "mhla", "max_chunks": 16},
    "gated": {"name": "mhla", "preset": "best", "max_chunks": 4},
    "softmax": {"name": "softmax"},
}


@pytest.mark.parametrize("name", ENTRIES)
def test_a_state_that_jumps_is_as_large_as_one_that_has_seen_all(name: str) -> None:
    """Counters, shapes and bytes; and the kinds of tokens are what really happens in the state."""
    sizes = {"depth": 1, "embed_dim": 64, "vocab_size": 32}
    model = build_model(ENTRIES[name], sizes, torch.device("cpu"))

    def facts(state: ModelState) -> list[object]:
        operator: Any = state.layers[0].operator
        if isinstance(operator, KeyValueCache):
            return [operator.lengths, operator.keys.shape, state.bytes, state.positions.tolist()]
        ring = operator.values.ring.shape
        return [operator.filled, operator.finished, ring, state.bytes, state.positions.tolist()]

    with torch.no_grad():
        for position in (70, 300):
            _, real = model.prefill(torch.zeros(1, position, dtype=torch.int64))
            state = state_at(model, position, 1, torch.Generator())
            assert facts(state) == facts(real)
            steps = 140
            told, seen = kinds(state, steps), []
            for _ in range(steps):
                before = facts(real)
                _, real = model.step(torch.zeros(1, dtype=torch.int64), real)
                after = facts(real)
                grew = (after[1] if name == "softmax" else after[2]) != (
                    before[1] if name == "softmax" else before[2]
                )
                words = [] if name == "softmax" else ["begins"] * (before[0] == [0])
                words += [] if name == "softmax" else ["ends"] * (after[0] == [0])
                seen.append(" ".join(words + ["grows"] * grew))
            assert told == seen
            assert facts(skipped(state, steps)) == facts(real)


def test_few_tokens_stand_for_all_of_their_kind() -> None:
    chosen = timed(["begins", *[""] * 62, "ends"] * 4)
    assert sum(weight for _, weight in chosen) == 256
    assert [weight for number, weight in chosen if number % 64 in (0, 63)] == [4, 4]
    assert timed([""] * 3) == [(0, 1), (1, 1), (2, 1)]
    assert len(timed(["", "grows"] * 200)) < 10


def test_the_mean_counts_each_kind_as_often_as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token costs 1 s, one that begins a chunk 65 s more, one that ends it 33 s more: 2.53 s on average."""
    model = build_model(ENTRIES["capped"], {"depth": 1, "embed_dim": 64}, torch.device("cpu"))
    calls = []

    def costs(model: Any, token: Any, state: ModelState, device: Any) -> tuple[float, ModelState]:
        (kind,) = kinds(state, 1)
        calls.append(kind)
        return 1.0 + 65 * ("begins" in kind) + 33 * ("ends" in kind), skipped(state, 1)

    monkeypatch.setattr(decode_speed, "_timed_step", costs)
    places = decode_at("mhla", model, [130, 5000], batch=1, tokens=256, turns=5)
    for place in places:
        assert place.seconds == pytest.approx([1 + (65 + 33) / 64] * 5)
    assert len(calls) < 5 * 2 * 10


def test_what_cannot_be_measured_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "decode", "--positions", "64"]) == 2
    assert "--positions" in capsys.readouterr().err
    assert main(["bench", "attention", "--causal", "--chunk-size", "0"]) == 2
    assert "--chunk-size" in capsys.readouterr().err
