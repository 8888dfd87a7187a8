"""Text is continued on a GPU as on a CPU, and token by token as at once. `make gpu`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mhla_lightning.backbones import build_backbone
from mhla_lightning.backbones.causal_lm import CausalLM
from mhla_lightning.inference.text import Execution, Sampling, generate
from mhla_lightning.inference.text.token_graph import cuda_graph
from tests.helpers.errors import refused

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = "cuda"
LM = {"vocab_size": 64, "context": 64, "embed_dim": 64, "depth": 2, "intermediate": 64}
ENTRIES: dict[str, Any] = {
    "mhla": {"name": "mhla", "chunk_size": 16, "max_chunks": 8, "heads": 2, "extrapolation": "shift"},
    "linear": {"name": "linear", "heads": 2},
    "softmax": {"name": "softmax", "heads": 2},
}


def language_model(name: str) -> CausalLM:
    torch.manual_seed(0)
    model = build_backbone("lm_tiny", attention=ENTRIES[name], **LM).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    assert isinstance(model, CausalLM)
    return model


@pytest.mark.parametrize("name", ENTRIES)
def test_text_is_continued_as_on_a_cpu(name: str) -> None:
    prompts = [[1, 2, 3], [4], list(range(40))]

    def continued(model: CausalLM, device: str) -> list[tuple[list[int], list[int]]]:
        steps = generate(model, prompts, Sampling(greedy=True), 40, device=device)
        return [(step.prompts, step.tokens) for step in steps]

    model = language_model(name)
    expected = continued(model, "cpu")
    assert continued(model.to(DEVICE), DEVICE) == expected


@pytest.mark.parametrize("name", ENTRIES)
@torch.no_grad()
def test_a_row_gives_what_its_tokens_give_one_by_one(name: str) -> None:
    model = language_model(name).to(DEVICE)
    tokens = torch.randint(64, (2, 50)).to(DEVICE)
    whole = model(tokens)
    _, state = model.prefill(tokens[:, :30])
    for place in range(30, 50):
        logits, state = model.step(tokens[:, place], state)
        assert torch.allclose(logits, whole[:, place], rtol=1e-3, atol=1e-3 * float(whole.abs().max()))


@pytest.mark.parametrize("sampling", [Sampling(greedy=True), Sampling(temperature=0.8, top_k=20)])
@pytest.mark.parametrize("name", ["mhla", "linear"])
def test_a_graph_of_a_whole_token_chooses_what_started_kernels_choose(name: str, sampling: Sampling) -> None:
    """Over three chunks; two of four sequences end early, so a second graph is captured."""
    model = language_model(name).to(DEVICE, torch.bfloat16)
    prompts, captures = [[1, 2, 3], [4], list(range(20)), [9]], []

    def capture(run: Callable[[], None]) -> Callable[[], None]:
        captures.append(run)
        return cuda_graph(run)

    def continued(execution: Execution) -> list[tuple[list[int], list[int]]]:
        counts = [0] * len(prompts)

        def stop(prompt: int, token: int) -> bool:
            counts[prompt] += 1
            return counts[prompt] == (40, 12, 40, 15)[prompt]

        steps = generate(model, prompts, sampling, 40, stop=stop, device=execution)
        return [(step.prompts, step.tokens) for step in steps]

    # The sequences that are left have the batch of the graph, so that products round alike.
    expected = continued(Execution(DEVICE, "off"))[:12]
    assert continued(Execution(DEVICE, "on", capture))[:12] == expected
    assert len(captures) == 2


def test_softmax_is_started_kernel_by_kernel_and_a_graph_of_it_refused() -> None:
    model = language_model("softmax").to(DEVICE, torch.bfloat16)
    assert len(list(generate(model, [[1, 2]], Sampling(greedy=True), 8, device=DEVICE))) == 8
    with refused("cuda_graph"):
        list(generate(model, [[1, 2]], Sampling(greedy=True), 8, device=Execution(DEVICE, "on")))
