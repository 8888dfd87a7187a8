"""Time of one more token at different positions.

The positions take turns token by token, so that a drifting machine cancels.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mhla_lightning.backbones import build_backbone
from mhla_lightning.backbones.causal_lm import CausalLM, ModelState


@dataclass
class DecodePoint:
    """One model at one position.

    seconds: per token, of every turn. state_bytes: of the state at the end, as allocated.
    """

    operator: str
    position: int
    seconds: list[float] = field(default_factory=list)
    state_bytes: int = 0

    def row(self) -> dict[str, Any]:
        """As the table and the JSON file show it."""
        seconds = statistics.median(self.seconds)
        return {
            "operator": self.operator,
            "position": self.position,
            "seconds_per_token": seconds,
            "state_bytes": self.state_bytes,
        }


def build_model(
    attention: str | Mapping[str, Any], shape: Mapping[str, Any], device: torch.device
) -> CausalLM:
    """lm_340m with other sizes where `shape` names them, random weights, float32."""
    model = build_backbone("lm_340m", attention=attention, **shape)
    assert isinstance(model, CausalLM)
    return model.to(device).eval()


@torch.no_grad()
def decode_at(
    operator: str,
    model: CausalLM,
    positions: Sequence[int],
    *,
    batch: int,
    tokens: int,
    turns: int,
    on_progress: Callable[[], None] = lambda: None,
) -> list[DecodePoint]:
    """Prefill to every position, then time more tokens, one at every position in turn.

    Each of `turns` rounds takes `tokens` tokens.
    """
    device = model.head_weight.device
    generator = torch.Generator().manual_seed(0)
    places, states = [DecodePoint(operator, position) for position in positions], []
    for position in positions:
        prompt = torch.randint(model.vocab_size, (batch, position), generator=generator).to(device)
        states.append(model.prefill(prompt)[1])
        on_progress()
    following = torch.randint(model.vocab_size, (turns * tokens, batch), generator=generator).to(device)
    for turn in range(turns):
        spent = [0.0] * len(positions)
        for token in following[turn * tokens : (turn + 1) * tokens]:
            for number in range(len(positions)):
                seconds, states[number] = _timed_step(model, token, states[number], device)
                spent[number] += seconds
        for place, seconds in zip(places, spent, strict=True):
            place.seconds.append(seconds / tokens)
        on_progress()
    for place, state in zip(places, states, strict=True):
        place.state_bytes = state.bytes
    return places


def _timed_step(
    model: CausalLM, token: torch.Tensor, state: ModelState, device: torch.device
) -> tuple[float, ModelState]:
    start = time.perf_counter()
    _, state = model.step(token, state)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, state
