"""A whole token that needs no host: replayed from a tape, on a pretended GPU, or refused in one sentence."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch

from mhla_lightning.attention.mhla.triton import choice
from mhla_lightning.attention.mhla.triton.launch import recorded
from mhla_lightning.backbones import build_backbone
from mhla_lightning.inference.text import Execution, Sampling, generate
from mhla_lightning.inference.text.token_graph import Decoding, tensors_of, write_over
from tests.helpers.errors import refused
from tests.helpers.pretended_gpu import pretended_gpu
from tests.helpers.token_graph_cases import LAYERS, MHLA, SIZES, continued, replayed


def same(run: Callable[[], None]) -> Callable[[], None]:
    """In place of a capture: the call itself."""
    return run


@pytest.mark.parametrize(
    ("layers", "sampling"),
    [
        (LAYERS[1:2], Sampling(temperature=0.9, top_k=7, seed=3)),
        pytest.param(LAYERS, Sampling(greedy=True), marks=pytest.mark.slow),
        pytest.param(LAYERS, Sampling(top_p=0.9, seed=2), marks=pytest.mark.slow),
    ],
)
def test_a_replayed_token_chooses_what_started_kernels_choose(
    interpreted: ProcessPoolExecutor, layers: list[dict[str, Any]], sampling: Sampling
) -> None:
    """Over several chunks; sequences end, and half of the batch being left is another capture."""
    eager, graph, captures, replays = interpreted.submit(replayed, layers, sampling, 9).result()
    assert graph == eager
    assert [len(prompts) for prompts, _, _ in graph] == [3, 3, 3, 3, 2, 1, 1, 1, 1]
    assert (captures, replays) == (2, 4)


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        ([{"name": "linear", "heads": 2}, {"name": "softmax", "heads": 2}], "layer 1 (softmax): its cache"),
        ([{**MHLA, "kernel": "torch"}], "layer 0 (mhla): its single tokens run on torch"),
        ([{**MHLA, "kernel": "torch", "intra": "window"}], "layer 0 (mhla): intra 'window'"),
    ],
)
def test_layers_that_need_the_host_are_named_or_started_kernel_by_kernel(
    layers: list[dict[str, Any]], reason: str
) -> None:
    greedy = Sampling(greedy=True)
    with refused("cuda_graph") as error:
        continued(layers, greedy, 6, Execution("cpu", "on", same))
    assert reason in error.value.reason
    with refused("cuda_graph"):
        continued(layers, greedy, 6, Execution("cpu", "on"))
    assert len(continued(layers, greedy, 6, Execution("cpu"))) == 6


def test_a_capture_that_fails_is_not_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    def fails(run: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing")

    layers = [{"name": "linear", "heads": 2}]
    model: Any = build_backbone("lm_tiny", attention=layers, depth=1, **SIZES).eval()

    def tokens(execution: Execution) -> list[int]:
        decoding = Decoding(model, model.init_state(1), Sampling(greedy=True), None, execution, 9)
        with torch.no_grad():
            first = decoding.first(torch.eye(1, SIZES["vocab_size"]), ["a"])
            return first + [token for n in range(1, 6) for token in decoding.next(n, n)]

    assert tokens(Execution("cpu", "auto", fails)) == tokens(Execution())
    assert caplog.text.count("no CUDA graph") == 1
    with refused("cuda_graph") as error:
        tokens(Execution("cpu", "on", fails))
    assert "not permitted" in error.value.reason


def test_a_text_beyond_the_matrix_is_refused_as_without_a_graph() -> None:
    """12 tokens fit; linear attention beside it is captured."""
    layers = [{"name": "linear", "heads": 2}, {**MHLA, "kernel": "torch"}]
    model: Any = build_backbone("lm_tiny", attention=layers, depth=2, **SIZES)
    model.check_length(12)
    with refused("extrapolation"):
        model.check_length(13)
    model = build_backbone("lm_tiny", attention=[{**MHLA, "extrapolation": "shift"}], depth=1, **SIZES)
    model.check_length(10_000)


def test_a_whole_token_waits_for_nothing_and_keeps_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel is only noted, so the numbers are not the model's."""
    monkeypatch.setattr(choice, "machine_obstacle", lambda q: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(Sampling, "check", lambda self, chosen: None)
    # Views of wrapped tensors, as a convolution takes, fail in torch's inference mode.
    layers = [{**entry, "kernel": "auto", "short_conv": 0} for entry in LAYERS]
    kept: list[list[int]] = []
    counts: list[int] = []

    def capture(run: Callable[[], None]) -> Callable[[], None]:
        decoding = run.__self__  # type: ignore[attr-defined]
        assert isinstance(decoding, Decoding)

        def watched() -> None:
            record.phase, before = "token", record.kernels["token"]
            run()
            record.phase = ""
            counts.append(record.kernels["token"] - before)
            kept.append([x.data_ptr() for x in tensors_of([decoding.state, *vars(decoding).values()])])

        return watched

    with torch.no_grad(), pretended_gpu(monkeypatch) as record, recorded():
        model: Any = build_backbone("lm_tiny", attention=layers, depth=len(layers), **SIZES).eval()
        model.to("cuda", torch.bfloat16)
        execution = Execution("cuda", "on", capture)
        steps = list(generate(model, [[1, 2], [3, 4]], Sampling(top_k=3), 9, device=execution))
    assert len(steps) == 9
    assert record.of("token") == {}
    assert len(kept) == 6  # the first is the prompt's, and two are started kernel by kernel
    assert all(addresses == kept[0] for addresses in kept)
    assert len(set(counts)) == 1
    assert counts[0] > 0


def test_a_state_that_grows_is_not_written_over() -> None:
    with pytest.raises(ValueError, match="grew from"):
        write_over([torch.zeros(2)], [torch.zeros(3)])
