"""What the benches do on a GPU, on a pretended one: events, CUDA graphs, FlashAttention and the model."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch.nn.attention import SDPBackend

from mhla_lightning.attention.mhla.triton import choice
from mhla_lightning.attention.mhla.triton.launch import recorded
from mhla_lightning.bench import decode_speed, kernel_times, timing
from mhla_lightning.bench.kernel_launches import A100, H100, H200, OperatorCase, modelled_gpu
from mhla_lightning.bench.timing import Case, GpuClock, make_case, take_turns
from mhla_lightning.cli.bench import on_gpu
from mhla_lightning.cli.main import main
from mhla_lightning.inference.text import Sampling
from tests.helpers.pretended_gpu import pretended_gpu

GPU = torch.device("cuda", 0)
MILLISECONDS = 2.0  # that every call takes on the pretended GPU


class Event:
    """A CUDA event after which MILLISECONDS have passed."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None: ...

    def elapsed_time(self, other: Event) -> float:
        return MILLISECONDS


class Graph:
    """A CUDA graph that counts its replays."""

    replays: ClassVar[int] = 0

    def replay(self) -> None:
        Graph.replays += 1


class Gpu:
    """What the fixture pretends beside tensors.

    Attributes:
        fails: what a capture raises; None lets it pass.
        flash: whether FlashAttention takes a call.
    """

    fails: RuntimeError | None = None
    flash = True


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    pretended = Gpu()

    @contextmanager
    def capture(graph: Graph, stream: Any) -> Iterator[None]:
        if pretended.fails is not None:
            raise pretended.fails
        yield

    @contextmanager
    def kernel(backend: SDPBackend) -> Iterator[None]:
        assert backend is SDPBackend.FLASH_ATTENTION
        if not pretended.flash:
            raise RuntimeError("No available kernel. Aborting execution.")
        yield

    Graph.replays = 0
    stream = SimpleNamespace(wait_stream=lambda other: None)
    with pretended_gpu(monkeypatch):
        for name, fake in {
            "Event": Event,
            "CUDAGraph": Graph,
            "graph": capture,
            "Stream": lambda device: stream,
            "stream": lambda stream: nullcontext(),
            "current_stream": lambda device: stream,
            "synchronize": lambda device: None,
            "get_device_properties": lambda device: SimpleNamespace(major=7),
            "get_device_name": lambda device: "NVIDIA H100 80GB HBM3",
        }.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(timing, "sdpa_kernel", kernel)
        monkeypatch.setattr(timing, "peak_bytes", lambda work, device: 0)
        monkeypatch.setattr(timing, "GPU_GEMM_SIDE", 8)
        monkeypatch.setattr(timing, "_COLD_BYTES", 8)
        monkeypatch.setattr(timing, "_REPEATED", 2 * MILLISECONDS / 1e3)
        yield pretended


def case_of(name: str, dtype: torch.dtype = torch.bfloat16) -> Case:
    entry = {"name": "mhla", "blocks": 4} if name == "mhla" else name
    return make_case(name, entry, 16, heads=1, dim=8, batch=1, device=GPU, dtype=dtype)


def turns(case: Case, **options: Any) -> dict[str, Any]:
    take_turns([case], 5, GPU, lambda case: None, **options)
    return case.row()


def test_short_calls_are_replayed_as_graphs(gpu: Gpu) -> None:
    row = turns(case_of("mhla"))
    assert row["forward_runs"] == row["step_runs"] == "as a CUDA graph"
    assert row["forward_seconds"] == row["step_seconds"] == MILLISECONDS / 1e3
    assert row["step_spread_seconds"] == 0
    assert Graph.replays == 2 * 5 * (1 + 2)  # a measurement is one call, and then as many as fit
    assert "softmax" not in row


@pytest.mark.parametrize("why", ["option", "capture", "long"])
def test_what_is_not_replayed_runs_eagerly(gpu: Gpu, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    gpu.fails = RuntimeError("operation not permitted when stream is capturing. More words.")
    if why == "long":
        monkeypatch.setattr(timing, "SMALL", 1e-3)
    row = turns(case_of("mhla"), graphs=why != "option")
    reason = "; no CUDA graph: operation not permitted when stream is capturing" if why == "capture" else ""
    assert row["step_runs"] == f"eagerly{reason}"
    assert row["step_seconds"] == MILLISECONDS / 1e3
    assert not Graph.replays


@pytest.mark.parametrize("flash", [True, False])
def test_softmax_runs_on_flash_attention_or_says_why_not(gpu: Gpu, flash: bool) -> None:
    gpu.flash = flash
    row = turns(case_of("softmax"))
    assert row["softmax"] == (
        "FlashAttention" if flash else "torch's choice; FlashAttention refuses: No available kernel"
    )


def test_a_stretch_of_calls_finds_the_cache_cold(gpu: Gpu) -> None:
    clock = GpuClock(GPU)
    written: list[int] = []
    clock._cold = SimpleNamespace(zero_=lambda: written.append(1))  # type: ignore[assignment]
    calls: list[int] = []
    assert clock.time(lambda: calls.append(1))[0] == MILLISECONDS / 1e3
    assert len(calls) == len(written) == 3


def test_rows_notes_and_columns(gpu: Gpu) -> None:
    case = case_of("softmax")
    row = turns(case)
    assert on_gpu.gpu_headings([row]) == ["quartiles apart", "modelled step"]
    assert on_gpu.gpu_cells(row) == ["0.000", "-"]
    case.modelled = (1e-3, 3e-3)
    assert on_gpu.gpu_cells(case.row()) == ["0.000", "3.000"]
    assert on_gpu.gpu_notes([row]) == [
        "softmax with FlashAttention: softmax 16",
        "forward as a CUDA graph: softmax 16",
        "step as a CUDA graph: softmax 16",
    ]


def test_a_row_of_a_cpu_has_nothing_of_it() -> None:
    case = make_case("softmax", "softmax", 16, heads=1, dim=8, batch=1, device=torch.device("cpu"))
    case.step = case.step_cpu = [1.0]
    case.gemm.append(1.0)
    assert not {key for key in case.row() if "runs" in key or "spread" in key or "modelled" in key}
    assert on_gpu.gpu_headings([case.row()]) == []


def test_kernels_are_measured_beside_the_model(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_times, "PATHS", ("torch", "flash"))  # Triton needs a real GPU
    monkeypatch.setattr(kernel_times, "GridRotation", lambda grid, dim, device: None)
    cases = [
        OperatorCase("image", 1, 1, 16, (4, 4), (2, 2)),
        OperatorCase("video", 1, 1, 16, (2, 2, 4), None, True, True),
    ]
    named: list[str] = []
    rows = kernel_times.measured_times(cases, 5, GPU, named.append)
    assert [row["case"] for row in rows] == ["image", "video"]
    for row in rows:
        assert row["torch_ms"] == row["flash_ms"] == MILLISECONDS
        assert (row["flash_runs"], row["torch_runs"]) == ("FlashAttention", "as a CUDA graph")
        assert row["torch_modelled_ms"] > row["flash_modelled_ms"] > 0
    assert len(named) == 2 * 2 * 6


def test_decoding_tries_a_graph_and_keeps_its_state(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    model = decode_speed.build_model(
        {"name": "mhla", "max_chunks": 4},
        {"depth": 1, "embed_dim": 64, "vocab_size": 32},
        torch.device("cpu"),
    ).to(GPU, torch.bfloat16)

    def measured() -> decode_speed.DecodePoint:
        return decode_speed.decode_at("mhla", model, [5], batch=1, tokens=2, turns=2)[0]

    place = measured()  # this GPU has no kernel for a token
    assert place.graph is not None
    assert place.graph[0].startswith("eagerly; no CUDA graph: layer 0 (mhla): its single tokens run on torch")
    assert place.graph[1] is None
    monkeypatch.setattr(choice, "machine_obstacle", lambda q: None)
    monkeypatch.setattr(Sampling, "check", lambda self, chosen: None)  # kernels are only noted
    with recorded():
        place = measured()
    assert place.graph == ("as a CUDA graph", MILLISECONDS / 1e3)
    assert place.seconds == [MILLISECONDS / 1e3] * 2
    gpu.fails = RuntimeError("it waits for the host")
    with recorded():
        place = measured()
    assert place.graph == ("eagerly; no CUDA graph: it waits for the host", None)
    assert place.row()["graph_seconds_per_token"] is None


def test_the_model_knows_three_gpus() -> None:
    names = ("NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA A100-SXM4-80GB", "NVIDIA L4")
    assert [modelled_gpu(name) for name in names] == [H100, H200, A100, None]


@pytest.mark.parametrize("causal", [False, True])
def test_predictions_are_the_models(causal: bool) -> None:
    layout = {"grid": [2048], "blocks": [32], "normalize": True, "chunk_size": 64}
    shape = (16, 2048, 4, 128)
    times = {
        name: kernel_times.predicted(name, shape, H100, layout=layout, causal=causal)
        for name in ("softmax", "mhla", "linear", "fla gla")
    }
    assert times["fla gla"] is None
    assert (times["linear"] is None) == causal
    for found in (times["softmax"], times["mhla"]):
        assert found is not None
        assert 1e-5 < found[0] < found[1] < 1e-2


def test_measuring_kernels_needs_a_gpu(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "kernels", "--measure"]) == 2
    assert "--measure: there is no CUDA device here" in capsys.readouterr().err


def test_a_plot_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "GEMM_SIDE", 64)
    target = tmp_path / "plot.png"
    arguments = ["--tokens", "64", "128", "--slope-to", "0", "--dim", "8", "--blocks", "8", "--turns", "5"]
    assert main(["bench", "attention", *arguments, "--plot", str(target)]) == 0
    assert target.read_bytes().startswith(b"\x89PNG")
    assert main(["bench", "attention", "--plot", str(tmp_path)]) == 2


def test_options_are_those_of_three_verbs() -> None:
    parser = argparse.ArgumentParser()
    on_gpu.add_gpu_arguments(parser)
    assert not parser.parse_args([]).no_graphs
    assert on_gpu.chosen_dtype(None, torch.device("cpu")) is torch.float32
    assert on_gpu.chosen_dtype(None, GPU) is torch.bfloat16
    assert on_gpu.chosen_dtype("float32", GPU) is torch.float32
