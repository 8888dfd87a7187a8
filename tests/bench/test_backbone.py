"""`mhla bench backbone`: what is measured and how it is reported; never how fast it was."""

from __future__ import annotations

import gc
import json
import time
import weakref
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from mhla_lightning.attention import BlockGrid
from mhla_lightning.backbones import build_backbone
from mhla_lightning.bench import timing
from mhla_lightning.bench.backbone_speed import FAMILIES, blocks_for, layout_for, make_case
from mhla_lightning.bench.timing import Case, take_turns
from mhla_lightning.cli.bench import backbone
from mhla_lightning.cli.main import main
from mhla_lightning.planning.memory import peak_bytes
from tests.helpers.errors import refused

CPU = torch.device("cpu")
SMALL = ["bench", "backbone", "dit_s8", "--layers", "1"]


@pytest.fixture(autouse=True)
def small_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """What times are compared with; how fast it is matters to no test."""
    monkeypatch.setattr(timing, "GEMM_SIDE", 64)


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
    assert (
        main(
            [
                *SMALL,
                "--res",
                "64",
                "--attention",
                "[mhla, {name: mhla, normalizer: none}]",
                "--json",
                str(target),
            ]
        )
        == 0
    )
    assert [row["operator"] for row in json.loads(target.read_text())["rows"]] == [
        "mhla",
        "mhla normalizer=none",
    ]


@pytest.mark.parametrize(
    ("grid", "blocks"),
    [
        ((16, 16), 4),
        ((32, 32), 4),
        ((64, 64), 8),
        ((128, 128), 8),
        ((16, 24), 4),
        ((21, 30, 50), 5),
        ((4, 4), 2),
        ((1, 1), 1),
    ],
)
def test_as_many_blocks_as_the_tokens_pay_for(grid: tuple[int, ...], blocks: int) -> None:
    """M^2 <= N (SPEC section 1): beyond it the summaries cost more than the tokens."""
    assert blocks_for(grid) == blocks
    assert blocks ** (2 * len(grid)) <= torch.Size(grid).numel()


@pytest.mark.parametrize(
    ("grid", "blocks"),
    [((21, 30, 50), (3, 5, 10)), ((8, 16, 16), (2, 4, 4)), ((1, 30, 50), (1, 3, 10)), ((1, 1, 1), (1, 1, 1))],
)
def test_blocks_of_a_clip_are_near_cubes_that_the_tokens_pay_for(
    grid: tuple[int, ...], blocks: tuple[int, ...]
) -> None:
    """31,500 tokens get the paper's layout."""
    assert layout_for(grid) == blocks


@pytest.mark.parametrize("grid", list(product((1, 2, 5, 9), (3, 15, 16), (5, 13, 26))), ids=str)
def test_every_layout_fits_and_pays(grid: tuple[int, ...]) -> None:
    blocks = BlockGrid(grid, layout_for(grid))
    assert blocks.num_blocks**2 <= blocks.tokens
    assert blocks.num_blocks >= blocks.tokens**0.5 / 8


VIDEO = ["bench", "backbone", "wan_tiny", "--layers", "3", "--video"]


@pytest.mark.slow
def test_clips_are_measured_by_layer_with_a_hybrid(tmp_path: Path) -> None:
    target = tmp_path / "bench.json"
    assert main([*VIDEO, "4x16x16", "2X8x16", "--json", str(target)]) == 0
    result = json.loads(target.read_text())
    rows = {(row["video"], row["operator"]): row for row in result["rows"]}
    clips = ("2x8x16", "4x16x16")
    assert set(rows) == set(product(clips, ("softmax", "linear", "mhla", "hybrid")))
    for row in rows.values():
        assert row["clips_per_second"] == pytest.approx(1 / row["step_seconds"])
        assert (row["forward_seconds_per_layer"], row["step_seconds_per_layer"]) == (
            row["forward_seconds"] / 3,
            row["step_seconds"] / 3,
        )
    hybrid = rows["4x16x16", "hybrid"]
    assert [entry["name"] for entry in hybrid["attention"]] == ["softmax", "mhla", "mhla"]
    assert hybrid["attention"][1]["blocks"] == list(layout_for((2, 4, 4)))
    pairs = (
        "mhla_over_linear",
        "softmax_over_mhla",
        "softmax_over_linear",
        "softmax_over_hybrid",
        "hybrid_over_mhla",
    )
    assert result["summary"].keys() == {
        f"{pair}_{kind}_{clip}" for pair in pairs for kind in ("forward", "step") for clip in clips
    }


@pytest.mark.slow
def test_a_run_that_is_stopped_keeps_the_sizes_it_has_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The largest clip takes the better part of an hour."""
    measure, target = backbone._measure, tmp_path / "bench.json"

    def stopped(args: Any, family: Any, size: Any, *rest: Any) -> Any:
        if size == (4, 16, 16):
            raise KeyboardInterrupt
        return measure(args, family, size, *rest)

    monkeypatch.setattr(backbone, "_measure", stopped)
    assert main([*VIDEO, "4x16x16", "2x8x16", "--attention", "[linear, mhla]", "--json", str(target)]) == 130
    result = json.loads(target.read_text())
    assert [(row["video"], row["operator"]) for row in result["rows"]] == [
        ("2x8x16", "linear"),
        ("2x8x16", "mhla"),
    ]
    assert result["summary"].keys() == {"mhla_over_linear_forward_2x8x16", "mhla_over_linear_step_2x8x16"}
    assert "2x8x16" in capsys.readouterr().out


@pytest.mark.slow
def test_hybrid_flops_lie_between_those_of_its_operators(tmp_path: Path) -> None:
    target = tmp_path / "bench.json"
    attention = "[softmax, mhla, [softmax, mhla, mhla], [mhla, softmax, {name: linear, gate: true}]]"
    assert main([*VIDEO, "4x32x32", "--attention", attention, "--json", str(target)]) == 0
    flops = {row["operator"]: row["flops_forward"] for row in json.loads(target.read_text())["rows"]}
    assert 3 * flops["hybrid"] == flops["softmax"] + 2 * flops["mhla"]
    assert "hybrid mhla, softmax, linear gate=True" in flops


def test_the_1_3b_model_is_measured_on_what_its_vae_makes_of_a_clip() -> None:
    family = FAMILIES["wan_1_3b"]
    assert [family.options(clip)["input_size"] for clip in family.sizes] == [
        (8, 32, 32),
        (8, 64, 64),
        (21, 60, 100),
    ]
    assert family.options((1, 480, 800)) == {"input_size": (1, 60, 100)}


def test_sana_is_measured_on_what_its_autoencoder_makes_of_an_image() -> None:
    family = FAMILIES["sana_600m"]
    assert [family.options(pixels)["input_size"] for pixels in family.sizes] == [32, 64, 128]
    assert family.blocks((32, 32)) == 4  # the preset's
    with refused("res"):
        family.options(1000)
    model: Any = build_backbone("sana_tiny", attention="mhla", depth=1, **FAMILIES["sana_tiny"].options(16))
    assert model(*FAMILIES["sana_tiny"].inputs(model, 2)).shape == (2, 3, 16, 16)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_peak_memory_without_data_is_that_with_data(checkpointing: bool) -> None:
    """A step at 31,500 tokens takes minutes; its memory can be found without one."""
    options: dict[str, Any] = {"input_size": (4, 32, 32), "depth": 2}
    case = make_case(
        "mhla", "wan_tiny", {"name": "mhla", "blocks": 2}, options, 1, CPU, checkpointing=checkpointing
    )
    assert case.peak_bytes == peak_bytes(case.run_step, CPU)


@pytest.mark.slow
def test_checkpointing_takes_less_memory(tmp_path: Path) -> None:
    peaks = []
    for flags in ([], ["--checkpointing"]):
        target = tmp_path / "bench.json"
        assert main([*VIDEO, "8x64x64", "--attention", "[linear]", *flags, "--json", str(target)]) == 0
        result = json.loads(target.read_text())
        assert result["checkpointing"] == bool(flags)
        peaks.append(result["rows"][0]["peak_bytes"])
    assert peaks[1] < 0.7 * peaks[0]


def test_a_step_reaches_every_parameter_of_a_branch_that_starts_at_zero() -> None:
    """Timing zeros would time nothing: every weight gets a gradient."""
    case = make_case("mhla", "dit_s8", {"name": "mhla", "blocks": 2}, {"input_size": 32, "depth": 1}, 2, CPU)
    case.run_step()
    held = [cell.cell_contents for cell in case.run_step.__closure__ or ()]
    (model,) = (value for value in held if isinstance(value, torch.nn.Module))
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_a_slow_case_is_measured_once_and_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SLOW", 0.05)
    calls = {"slow": 0, "fast": 0}

    def work(name: str, seconds: float) -> None:
        calls[name] += 1
        time.sleep(seconds)

    slow = Case("softmax", 1, 1, None, lambda: work("slow", 0.06))
    fast = Case("mhla", 1, 1, None, lambda: work("fast", 0.0))
    turns: list[str] = []
    take_turns([slow, fast], 5, CPU, lambda case: turns.append(case.operator))
    assert turns == 6 * ["softmax", "mhla"], "the bar ends where it was said to end"
    assert calls == {"slow": 1, "fast": 6}
    assert (len(slow.step), len(fast.step), slow.forward) == (1, 5, [])
    assert "forward_seconds" not in slow.row()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["deit_tiny"], "deit_tiny"),
        (["dit_s2", "--res", "100"], "--res"),
        (["dit_s8", "--res", "72"], "input_size"),
        (["dit_s2", "--turns", "3"], "--turns"),
        (["dit_s2", "--layers", "0"], "--layers"),
        (["dit_s2", "--attention", "[softmax"], "--attention"),
        (["dit_s2", "--attention", "[]"], "--attention"),
        (["dit_s2", "--attention", "[{blocks: 4}]"], "--attention"),
        (["dit_s2", "--attention", "[mhla, mhla]"], "--attention"),
        (["dit_s2", "--attention", "[sofmax]"], "did you mean 'softmax'"),
        (["dit_s2", "--pos-conv", "cpe5"], "pos_conv"),
        (["dit_s2", "--res", "64", "--blocks", "3"], "blocks"),
        (["dit_s2", "--device", "tpu"], "--device"),
        (["dit_s2", "--video", "4x16x16"], "--video"),
        (["wan_1_3b", "--res", "256"], "--res"),
        (
            ["wan_1_3b", "--video", "80x480x800"],
            "--video",
        ),
        (["wan_1_3b", "--video", "81x480x808"], "--video"),
        (["wan_1_3b", "--video", "81x480"], "--video"),
        (["wan_tiny", "--video", "3x16x16"], "frames"),
        (["wan_tiny", "--attention", "[[]]"], "--attention"),
        (["wan_tiny", "--attention", "[[softmax, mlha]]"], "did you mean 'mhla'"),
    ],
    ids=str,
)
def test_what_cannot_be_measured_is_refused_first(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
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
    model: Any = build_backbone(
        "dit_s8", attention="linear", input_size=16, embed_dim=16, depth=2, num_heads=2
    )
    for block in model.blocks:
        block.mlp.act = _WatchedLayer()
    inputs = torch.randn(1, 4, 16, 16), torch.tensor([3]), torch.tensor([1])
    _Watched.alive.clear()
    assert peak_bytes(lambda: model(*inputs).square().mean().backward(), CPU) > 0
    gc.collect()
    assert [ref() for ref in _Watched.alive] == [None, None]


def test_bench_attention_on_a_grid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "bench.json"
    arguments = ["bench", "attention", "--grid", "4", "6", "8", "--heads", "2", "--dim", "8", "--turns", "5"]
    assert main([*arguments, "--json", str(target)]) == 0
    result = json.loads(target.read_text())
    assert [(row["tokens"], row["operator"]) for row in result["rows"]] == [
        (192, name) for name in ("softmax", "linear", "mhla")
    ]
    assert {"sdpa_over_mhla_forward", "mhla_over_linear_forward"} <= result["summary"].keys()
    assert main([*arguments, "--blocks", "2", "3", "4", "--json", str(target)]) == 0
    blocks = BlockGrid((4, 6, 8), (2, 3, 4))
    products = (
        2 * 192 * 8 * 8 + 24**2 * 8 * 8
    )  # S and its readings, the mixture; three axes are a video's, without a normalizer
    assert (blocks.num_blocks, json.loads(target.read_text())["rows"][2]["flops_forward"]) == (
        24,
        2 * 2 * products,
    )
    for wrong, words in (
        (["--causal"], "it does not go with --causal"),
        (["--slope-to", "512"], "it does not go with --slope-to"),
        (["--blocks", "3", "3", "4"], "blocks"),
    ):
        assert main([*arguments, *wrong]) == 2
        assert words in capsys.readouterr().err
