"""Continuing text, and drawing images and videos, on a pretended GPU: the numbers of the CPU, one device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mhla_lightning.attention.mhla.decode import MHLAState
from mhla_lightning.attention.mhla.triton import choice
from mhla_lightning.attention.mhla.triton.launch import recorded
from mhla_lightning.backbones import build_backbone
from mhla_lightning.diffusion import Guidance, build_process, sample
from mhla_lightning.diffusion.guidance import guided
from mhla_lightning.inference.text import Execution, Sampling, generate
from tests.helpers.pretended_gpu import GpuTensor, Record, pretended_gpu

MHLA = {"name": "mhla", "chunk_size": 4, "max_chunks": 8, "heads": 2, "extrapolation": "shift"}
LM = {"vocab_size": 24, "context": 16, "embed_dim": 8, "depth": 2, "intermediate": 16}
DIT = {"input_size": 8, "in_channels": 3, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 4}
WAN = {
    "input_size": [4, 8, 8],
    "embed_dim": 32,
    "ffn_dim": 48,
    "depth": 1,
    "num_heads": 2,
    "freq_dim": 16,
    "text_dim": 8,
    "text_length": 6,
}


def model_of(name: str, attention: Any, options: dict[str, Any]) -> torch.nn.Module:
    """A model without zeros, so that every layer counts."""
    torch.manual_seed(0)
    model = build_backbone(name, attention=attention, **options).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05 if name == "dit_s2" else 0.3)
    return model


@pytest.mark.parametrize("attention", [MHLA, {"name": "linear", "heads": 2}])
def test_text_is_continued_as_on_a_cpu(attention: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [[1, 2, 3], [4], list(range(10))]

    def continued(model: Any, device: str) -> list[tuple[list[int], list[int]]]:
        execution = Execution(device, capture=lambda run: run)  # linear attention takes it
        steps = generate(model, prompts, Sampling(temperature=0.8), 6, device=execution)
        return [(step.prompts, step.tokens) for step in steps]

    expected = continued(model_of("lm_tiny", attention, LM), "cpu")
    with pretended_gpu(monkeypatch) as record:
        assert continued(model_of("lm_tiny", attention, LM).to("cuda"), "cuda") == expected
    assert record.waits  # every token is read


RELATIVE = {"mix_form": "relative", "decay": "token", "decay_span": "sequence", "normalizer": "block"}
LAYERS: list[dict[str, Any]] = [
    MHLA,
    {**MHLA, "extrapolation": None, **RELATIVE, "max_chunks": 3, "short_conv": 2},
    {**MHLA, "decay": "head"},
    {**MHLA, "intra": "window"},
    {"name": "linear", "heads": 2, "decay": "token"},
    {"name": "softmax", "heads": 2},
]


def test_a_token_waits_for_nothing_in_any_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = torch.randint(24, (12, 2))

    def logits(device: str) -> torch.Tensor:
        model: Any = model_of("lm_tiny", LAYERS, {**LM, "depth": len(LAYERS)}).to(device)
        prompt, following = tokens[:3].T.to(device), [x.to(device) for x in tokens[3:]]
        _, state = model.prefill(prompt)
        for token in following:  # more than two chunks
            record.phase = "token"
            out, state = model.step(token, state)
            record.phase = ""
        return out

    record = Record()
    with torch.no_grad():
        expected = logits("cpu")
        with pretended_gpu(monkeypatch) as record:
            found = logits("cuda")
    assert isinstance(found, GpuTensor)
    assert torch.allclose(found.held, expected, atol=1e-4)
    assert record.of("token") == {}
    assert record.kernels["token"]


def test_a_token_is_one_kernel_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel is only noted, so the numbers are not the model's."""
    layers = [entry for entry in LAYERS if entry["name"] != "softmax" and "intra" not in entry]
    monkeypatch.setattr(choice, "machine_obstacle", lambda q: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    seen: list[int] = []
    with torch.no_grad(), pretended_gpu(monkeypatch) as record:
        model: Any = model_of("lm_tiny", layers, {**LM, "depth": len(layers)}).to("cuda", torch.bfloat16)
        with recorded() as launches:
            _, state = model.prefill(torch.ones(2, 3, dtype=torch.int64).to("cuda"))
        assert "causal_forward_kernel" in {launch.name for launch in launches}
        token = torch.ones(2, dtype=torch.int64).to("cuda")
        for number in range(9):
            record.phase = "token" if number else ""  # the first token moves the positions to the device
            with recorded() as launches:
                _, state = model.step(token, state)
            seen.append(len(launches))
            assert {launch.name for launch in launches} == {"decode_kernel"}
    assert seen == [len(layers)] * 9
    assert record.of("token") == {}
    operators = [layer.operator for layer in state.layers]
    assert [operator.finished for operator in operators if isinstance(operator, MHLAState)] == [[3, 3]] * 3


@pytest.mark.parametrize(
    ("process", "sampler"),
    [("ddpm", "ddpm"), ("ddpm", "ddim"), ("ddpm", "dpm++"), ("flow", "euler"), ("flow", "dpm++")],
)
def test_images_are_drawn_as_on_a_cpu(process: str, sampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers")
    steps = build_process(process)
    options = {**DIT, "learn_sigma": steps.out_channels(1) == 2}
    noise, labels = torch.randn(2, 3, 8, 8), torch.tensor([1, 3])

    def drawn(device: str) -> torch.Tensor:
        model = model_of("dit_s2", {"name": "mhla", "blocks": 2}, options).to(device)
        denoise = guided(model, labels.to(device), 4, Guidance(2.0))
        with torch.no_grad():
            return sample(
                denoise,
                steps,
                sampler=sampler,
                steps=3,
                noise=noise.to(device),
                step_noise=lambda number: noise.roll(number, 0).to(device),
            )

    expected = drawn("cpu")
    with pretended_gpu(monkeypatch):
        found = drawn("cuda")
    assert isinstance(found, GpuTensor)
    assert expected.isfinite().all()
    assert torch.allclose(found.held, expected, atol=1e-5)


def test_a_video_is_drawn_as_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers")
    noise, text = torch.randn(1, 3, 4, 8, 8), torch.randn(1, 6, 8)

    def drawn(device: str) -> torch.Tensor:
        model: Any = model_of("wan_tiny", {"name": "mhla", "blocks": [2, 2, 2]}, WAN).to(device)
        channels = model.in_channels
        x = noise[:, :1].expand(-1, channels, -1, -1, -1).contiguous()
        denoise = guided(model, text.to(device), torch.zeros(6, 8, device=device), Guidance(2.0))
        with torch.no_grad():
            return sample(
                denoise,
                build_process("flow"),
                sampler="euler",
                steps=2,
                noise=x.to(device),
                step_noise=lambda number: noise,
            )

    expected = drawn("cpu")
    with pretended_gpu(monkeypatch):
        found = drawn("cuda")
    assert isinstance(found, GpuTensor)
    assert expected.isfinite().all()
    assert torch.allclose(found.held, expected, atol=1e-5)
