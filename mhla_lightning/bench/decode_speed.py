"""Time of one more token at different positions.

The positions take turns token by token, so that a drifting machine cancels. A state reaches its position by
setting counters and sizes: the time of a step does not depend on the numbers in it. The mean over a stretch
of tokens takes some of each kind of token, and jumps over the others.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mhla_lightning.attention.baselines.causal_softmax import GROWTH, KeyValueCache
from mhla_lightning.attention.mhla.decode import MHLAState, make_room
from mhla_lightning.backbones import build_backbone
from mhla_lightning.backbones.causal_lm import CausalLM, ModelState
from mhla_lightning.bench.timing import GRAPH, GpuClock, seconds_once, spread
from mhla_lightning.inference.text import Execution, Sampling
from mhla_lightning.inference.text.token_graph import Decoding

_PROMPT = 128  # tokens that a model really sees before a position, at least; a multiple of the chunks
_GRAPH_TOKENS = 64  # that a graph adds at most while it is warmed up and timed
_TIMED = 6  # tokens of the common kind that a measurement times


@dataclass
class DecodePoint:
    """One model at one position.

    Attributes:
        seconds: per token, of every turn.
        state_bytes: of the state at the end, as allocated.
        graph: on a GPU, how one token runs as a CUDA graph, and its seconds; None where it does not.
    """

    operator: str
    position: int
    seconds: list[float] = field(default_factory=list)
    state_bytes: int = 0
    graph: tuple[str, float | None] | None = None

    def row(self) -> dict[str, Any]:
        """As the table and the JSON file show it."""
        seconds = statistics.median(self.seconds)
        row = {
            "operator": self.operator,
            "position": self.position,
            "seconds_per_token": seconds,
            "state_bytes": self.state_bytes,
        }
        if self.graph is not None:
            row["spread_seconds"] = spread(self.seconds)
            row["graph"], row["graph_seconds_per_token"] = self.graph
        return row


def build_model(
    attention: str | Mapping[str, Any], shape: Mapping[str, Any], device: torch.device
) -> CausalLM:
    """Return lm_340m of other sizes where `shape` names them, with random weights.

    It is in bf16 on a GPU, else in float32.
    """
    model = build_backbone("lm_340m", attention=attention, **shape)
    assert isinstance(model, CausalLM)
    return model.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32).eval()


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
    graphs: bool = True,
) -> list[DecodePoint]:
    """Bring a state to every position, then time more tokens, one at every position in turn.

    Each of `turns` rounds moves on by `tokens` tokens. Of tokens that do the same work, see :func:`kinds`,
    some are timed and stand for all of them.
    """
    device = model.head_weight.device
    generator = torch.Generator().manual_seed(0)
    places, states = [DecodePoint(operator, position) for position in positions], []
    for position in positions:
        states.append(state_at(model, position, batch, generator))
        on_progress()
    if device.type == "cuda" and graphs:
        for place, state in zip(places, states, strict=True):
            place.graph = _as_graph(model, state, place.position, device)
    following = torch.randint(model.vocab_size, (turns, tokens, batch), generator=generator).to(device)
    for turn in range(turns):
        spent, at = [0.0] * len(positions), [0] * len(positions)
        plans = [timed(kinds(state, tokens)) for state in states]
        for steps in zip_longest(*plans):
            for number, step in enumerate(steps):
                if step is not None:
                    offset, weight = step
                    state = skipped(states[number], offset - at[number])
                    seconds, states[number] = _timed_step(model, following[turn, offset], state, device)
                    spent[number] += weight * seconds
                    at[number] = offset + 1
        for number, place in enumerate(places):
            states[number] = skipped(states[number], tokens - at[number])
            place.seconds.append(spent[number] / tokens)
        on_progress()
    for place, state in zip(places, states, strict=True):
        place.state_bytes = state.bytes
    return places


def state_at(model: CausalLM, position: int, batch: int, generator: torch.Generator) -> ModelState:
    """Return a state of the size that it has after `position` tokens.

    The model sees only the last of them, so that no time goes into a long prompt.
    """
    seen = position if position < 2 * _PROMPT else _PROMPT + position % _PROMPT
    prompt = torch.randint(model.vocab_size, (batch, seen), generator=generator)
    _, state = model.prefill(prompt.to(model.head_weight.device))
    return skipped(state, position - seen, prompt=True)


def skipped(state: ModelState, tokens: int, prompt: bool = False) -> ModelState:
    """Return a state of the size that it has after more tokens; the sums in it are not theirs.

    Args:
        state: may change in place.
        tokens: number of tokens.
        prompt: a cache takes as much room as after a prompt, instead of growing step by step.

    Raises:
        TypeError: a state that cannot jump.
    """
    if not tokens:
        return state
    layers = tuple(
        replace(layer, operator=_skipped(layer.operator, tokens, prompt)) for layer in state.layers
    )
    return ModelState(layers, state.positions + tokens)


def _skipped(state: object, tokens: int, prompt: bool) -> Any:
    if isinstance(state, MHLAState):
        size = state.rule.chunk_size
        total, before = [filled + tokens for filled in state.filled], max(state.finished)
        state.finished = [done + n // size for done, n in zip(state.finished, total, strict=True)]
        state.filled = [n % size for n in total]
        if state.tokens is not None:  # a kernel counts them
            state.tokens += tokens
        for finished in [max(state.finished)] if prompt else range(before + 1, max(state.finished) + 1):
            make_room(state, finished)
        return state
    if isinstance(state, KeyValueCache):
        lengths = [length + tokens for length in state.lengths]
        missing = max(0, max(lengths) - state.keys.shape[2])
        room = missing if prompt else -(-missing // GROWTH) * GROWTH
        keys, values = (F.pad(x, (0, 0, 0, room)) if room else x for x in (state.keys, state.values))
        return KeyValueCache(keys, values, lengths)
    raise TypeError(f"a {type(state).__name__} cannot jump over tokens")


def kinds(state: ModelState, tokens: int) -> list[str]:
    """Return the work that each of the next tokens does beside that of every token.

    A token may begin a chunk, end it, or find no room in the state, which then grows.
    """
    operator: object = state.layers[0].operator
    if isinstance(operator, KeyValueCache):
        free = operator.keys.shape[2] - max(operator.lengths)
        return ["grows" if n >= free and (n - free) % GROWTH == 0 else "" for n in range(tokens)]
    assert isinstance(operator, MHLAState)
    size, places, found = operator.rule.chunk_size, operator.values.ring.shape[2], []
    for n in range(tokens):
        finished, filled = divmod(operator.finished[0] * size + operator.filled[0] + n, size)
        grows = filled == size - 1 and places < min(finished + 1, operator.reach.kept)
        if grows:
            places = min(operator.reach.kept, max(finished + 1, 2 * places))
        found.append(
            " ".join(
                word
                for word, true in (("begins", filled == 0), ("ends", filled == size - 1), ("grows", grows))
                if true
            )
        )
    return found


def timed(kinds: Sequence[str]) -> list[tuple[int, float]]:
    """Return the tokens of a stretch that are timed, and how many tokens each stands for.

    Args:
        kinds: of every token of the stretch, see :func:`kinds`.

    Returns:
        (number of the token, weight); the weights add up to the tokens.
    """
    chosen = []
    for kind in dict.fromkeys(kinds):
        members = [number for number, own in enumerate(kinds) if own == kind]
        count = min(len(members), _TIMED if kind == "" else 1)
        picked = [members[part * len(members) // count] for part in range(count)]
        chosen += [(number, len(members) / count) for number in picked]
    return sorted(chosen)


def _timed_step(
    model: CausalLM, token: Tensor, state: ModelState, device: torch.device
) -> tuple[float, ModelState]:
    following: list[ModelState] = []
    seconds = seconds_once(lambda: following.append(model.step(token, state)[1]), device)
    return seconds, following[0]


def _as_graph(
    model: CausalLM, state: ModelState, position: int, device: torch.device
) -> tuple[str, float | None]:
    """Return how a token after `state` and its choice run as a CUDA graph, and the seconds."""
    clock, batch = GpuClock(device), len(state.positions)
    most = position + _GRAPH_TOKENS
    held = copy.deepcopy(state)
    decoding = Decoding(model, held, Sampling(greedy=True), None, Execution(device), most)
    decoding.first(torch.zeros(batch, model.vocab_size).to(device), [""] * batch)
    decoding.token()
    reason = model.host_needed(decoding.state)
    if reason is not None:
        return f"eagerly; no CUDA graph: {reason}", None
    run, how = clock.replayed(decoding.token)
    return how, clock.time(run)[0] if how == GRAPH else None
