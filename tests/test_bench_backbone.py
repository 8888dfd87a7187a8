"""`mhla bench backbone`: what is measured and how it is reported; never how fast it was."""

from __future__ import annotations

import gc
import json
import time
import weakref
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from mhla_lightning.analysis import timing
from mhla_lightning.analysis.backbone_speed import blocks_for, make_case
from mhla_lightning.analysis.memory import peak_bytes
from mhla_lightning.analysis.timing import Case, take_turns
from mhla_lightning.backbones import build_backbone
from mhla_lightning.cli.main import main

CPU = torch.device("cpu")
SMALL = ["bench", "backbone", "dit_s8", "--layers", "1"]


def test_rows_and_ratios_of_every_size(tmp_path: Path) -> None:
    target = tmp_path / "bench.json"
    assert main([*SMALL, "--res", "128", "64", "--batch", "2", "--json", str(target)]) == 0
    result = json.loads(target.read_text())
    rows = {(row["resolution"], row["operator"]): row for row in result["rows"]}
    assert set(rows) == {(pixels, name) for pixels in (64, 128) for name in ("softmax", "linear", "mhla")}
    for row in rows.values():
        assert row["images_per_second"] == pytest.approx(2 / row["step_seconds"])
        assert (row["turns"], row["measured_once"]) == (5, False)
        assert row["peak_bytes"] > 0
        assert (row["attention"]["pos_conv"], row["attention"]["gate"]) == ("cpe3", False)
    assert {row["tokens"] for (pixels, _), row in rows.items() if pixels == 128} == {(128 // 8 // 8) ** 2}
    pairs = ("mhla_over_linear", "softmax_over_mhla", "softmax_over_linear")
    assert result["summary"].keys() == {f"{pair}_{pixels}" for pair in pairs for pixels in (64, 128)}


def test_flops_are_those_of_the_same_model_elsewhere(tmp_path: Path) -> None:
    target = tmp_path / "bench.json"
    entry = "[{name: mhla, pos_conv: none, gate: true, blocks: 2}, softmax]"
    assert main([*SMALL, "--res", "256", "--attention", entry, "--json", str(target)]) == 0
    rows = {row["operator"]: row for row in json.loads(target.read_text())["rows"]}
    attention: dict[str, dict[str, Any]] = {
        "mhla": {"name": "mhla", "pos_conv": "none", "gate": True, "blocks": 2},
        "softmax": {"name": "softmax", "pos_conv": "cpe3"},
    }
    for name, given in attention.items():
        model = build_backbone("dit_s8", attention=given, depth=1)
        assert rows[name]["flops_forward"] == model.flops((4, 4))  # type: ignore[operator]


def test_entries_of_one_operator_are_told_apart(tmp_path: Path) -> None:
    target = tmp_path / "bench.json"
    assert main([*SMALL, "--res", "64", "--attention", "[mhla, {name: mhla, normalizer: none}]", "--json", str(target)]) == 0
    assert [row["operator"] for row in json.loads(target.read_text())["rows"]] == ["mhla", "mhla normalizer=none"]


@pytest.mark.parametrize(
    ("grid", "blocks"), [((16, 16), 4), ((32, 32), 4), ((64, 64), 8), ((128, 128), 8), ((16, 24), 4), ((21, 30, 50), 5), ((4, 4), 2), ((1, 1), 1)]
)
def test_as_many_blocks_as_the_tokens_pay_for(grid: tuple[int, ...], blocks: int) -> None:
    """M^2 <= N (SPEC section 1): beyond it the summaries cost more than the tokens."""
    assert blocks_for(grid) == blocks
    assert blocks ** (2 * len(grid)) <= torch.Size(grid).numel()


def test_a_step_reaches_every_parameter_of_a_branch_that_starts_at_zero() -> None:
    """Timing zeros would time nothing: every weight gets a gradient."""
    case = make_case("mhla", "dit_s8", {"name": "mhla", "blocks": 2}, {"input_size": 32, "depth": 1}, 2, CPU)
    case.run_step()
    held = [cell.cell_contents for cell in case.run_step.__closure__ or ()]
    (model,) = (value for value in held if isinstance(value, torch.nn.Module))
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_a_slow_case_is_measured_once_and_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SLOW", 0.05)
    monkeypatch.setattr(timing, "GEMM_SIDE", 8)
    calls = {"slow": 0, "fast": 0}

    def work(name: str, seconds: float) -> None:
        calls[name] += 1
        time.sleep(seconds)

    slow = Case("softmax", 1, 1, None, lambda: work("slow", 0.06))
    fast = Case("mhla", 1, 1, None, lambda: work("fast", 0.0))
    take_turns([slow, fast], 5, CPU, lambda: None)
    assert calls == {"slow": 1, "fast": 6}
    assert (len(slow.step), len(fast.step), slow.forward) == (1, 5, [])
    assert "forward_seconds" not in slow.row()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["deit_tiny"], "unknown backbone 'deit_tiny' of bench backbone"),
        (["dit_s2", "--res", "100"], "--res 100 is no multiple of 8, the VAE's stride; use 96"),
        (["dit_s8", "--res", "72"], "input_size 9 is no multiple of patch_size 8; use 8 or 16"),
        (["dit_s2", "--turns", "3"], "--turns is 3; it must be at least 5"),
        (["dit_s2", "--layers", "0"], "--layers is 0; it must be at least 1"),
        (["dit_s2", "--attention", "[softmax"], "this is no YAML"),
        (["dit_s2", "--attention", "[]"], "--attention is an empty list"),
        (["dit_s2", "--attention", "[{blocks: 4}]"], "takes a list of names or mappings with a name"),
        (["dit_s2", "--attention", "[mhla, mhla]"], "--attention has mhla twice"),
        (["dit_s2", "--attention", "[sofmax]"], "did you mean 'softmax'"),
        (["dit_s2", "--pos-conv", "cpe5"], "unknown pos_conv 'cpe5'"),
        (["dit_s2", "--res", "64", "--blocks", "3"], "blocks=3 does not fit an axis of 4 tokens"),
        (["dit_s2", "--device", "tpu"], "--device tpu"),
    ],
    ids=str,
)
def test_what_cannot_be_measured_is_refused_first(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "backbone", *arguments]) == 2
    assert words in capsys.readouterr().err


class _Watched(torch.autograd.Function):
    """The identity; `alive` tells which graphs are still there."""

    alive: ClassVar[list[weakref.ref[Any]]] = []

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        _Watched.alive.append(weakref.ref(ctx))
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad


class _WatchedLayer(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Watched.apply(x)


def test_what_was_measured_is_let_go() -> None:
    """At 16,384 tokens three models of dit_s2 that keep their activations do not fit into 23 GB."""
    model: Any = build_backbone("dit_s8", attention="linear", input_size=16, embed_dim=16, depth=2, num_heads=2)
    for block in model.blocks:
        block.mlp.act = _WatchedLayer()
    inputs = torch.randn(1, 4, 16, 16), torch.tensor([3]), torch.tensor([1])
    _Watched.alive.clear()
    assert peak_bytes(lambda: model(*inputs).square().mean().backward(), CPU) > 0
    gc.collect()
    assert [ref() for ref in _Watched.alive] == [None, None]
