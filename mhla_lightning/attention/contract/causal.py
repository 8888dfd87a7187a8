"""Checks of causal operators: the future, padding, packed documents, and token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from mhla_lightning.attention.base import CausalAttention
from mhla_lightning.attention.contract.subject import TOKENS, Broken, Inputs, Subject, cut, loud, rows


def check_causality(subject: Subject) -> str:
    """Check that no token sees a later one, bit for bit."""
    operator = subject.build_causal()
    with torch.no_grad():
        x = subject.inputs(operator)
        out = operator(**x)
        for t in (0, 7, 8, 17, TOKENS - 1):
            moved = {name: one.clone() for name, one in x.items()}
            for name in moved:
                moved[name][:, t] = moved[name][:, t] * 3 - (0 if name in ("log_decay", "beta") else 1)
            other = operator(**moved)
            seen = ((other - out)[:, :t] != 0).flatten(2).any(-1).any(0).nonzero()
            if len(seen):
                raise Broken(f"a causal leak: token {int(seen[0])} sees token {t}, which comes later")
            if torch.equal(other[:, t:], out[:, t:]):
                raise Broken(f"token {t} has no effect on itself and on later tokens")
    return f"no token of {TOKENS} sees a later one"


def check_padding(subject: Subject) -> str:
    """Check that a padded sequence is as if alone, in `forward`, `prefill` and `step`."""
    operator, missing, prompt = subject.build_causal(), [3, 8, 0], TOKENS - 6
    with torch.no_grad():
        x = subject.inputs(operator, batch=3)
        for side in ("left", "right"):
            mask = torch.ones(3, prompt, dtype=torch.bool, device=subject.device)
            for row, n in enumerate(missing):
                mask[row, slice(0, n) if side == "left" else slice(prompt - n, prompt)] = False
            given = loud(cut(x, 0, prompt), mask, 1e3)
            out = operator(**given, mask=mask)
            if (out[~mask] != 0).any():
                raise Broken(f"padded outputs are not 0 (padding {side})")
            streamed = stream(operator, {**x, **_joined(given, cut(x, prompt, None))}, prompt, mask)
            for row in range(3):
                real = torch.cat([mask[row], mask.new_ones(TOKENS - prompt)])
                alone = operator(**{name: one[:, real] for name, one in rows(x, row, row + 1).items()})[0]
                subject.close(out[row, mask[row]], alone[: int(mask[row].sum())], f"padding {side}")
                subject.close(streamed[row, real], alone, f"padding {side}, token by token")
    return "left and right, in parallel and token by token"


def check_packing(subject: Subject) -> str:
    """Check that documents in one row are each as if alone, with all gradients."""
    operator = subject.build_causal()
    x = subject.inputs(operator)
    borders = [[0, 5, 6, 17, TOKENS], [0, 16]]  # the second row ends in padding
    documents = torch.zeros(2, TOKENS, dtype=torch.int64)
    mask = torch.ones(2, TOKENS, dtype=torch.bool)
    mask[1, 16:] = False
    alone = torch.zeros_like(x["v"])
    for row, ends in enumerate(borders):
        for number, (start, stop) in enumerate(zip(ends, ends[1:], strict=False)):
            documents[row, start:stop] = number
            one = operator(**cut(rows(x, row, row + 1), start, stop))
            alone = alone + torch.nn.functional.pad(one, (0, 0, 0, 0, start, TOKENS - stop, row, 1 - row))
    documents, mask = documents.to(subject.device), mask.to(subject.device)
    packed = operator(**loud(x, mask, torch.nan), documents=documents, mask=mask)
    subject.close(packed, alone, "packed documents")
    if (packed[~mask] != 0).any():
        raise Broken("padded outputs beside packed documents are not 0")
    subject.same_gradients(operator, x, packed, alone)
    return "documents of 5, 1, 11, 7 and 16 tokens as if alone"


def check_streaming(subject: Subject) -> str:
    """Check that token by token is the same as in parallel, with all gradients."""
    operator = subject.build_causal()
    x = subject.inputs(operator)
    for prompt in (0, TOKENS // 2, TOKENS - 1):
        expected = operator(**x)  # anew, because comparing gradients frees the graph
        out = stream(operator, x, prompt)
        subject.close(out, expected, f"a prompt of {prompt} tokens, then one by one")
        subject.same_gradients(operator, x, out, expected)
    return f"prompts of 0, {TOKENS // 2} and {TOKENS - 1} tokens, then one by one"


def check_reorder(subject: Subject) -> str:
    """Check that a state can be reordered, as beam search does."""
    operator, order = subject.build_causal(), torch.tensor([1, 1, 0])
    with torch.no_grad():
        x = subject.inputs(operator)
        expected = operator(**x)
        _, state = operator.prefill(**cut(x, 0, TOKENS - 3))
        if state.bytes <= 0:
            raise Broken(f"the state's bytes are {state.bytes}")
        state = state.reorder(order)
        for t in range(TOKENS - 3, TOKENS):
            now = {name: one[order.to(one.device)] for name, one in cut(x, t, t + 1).items()}
            out, state = operator.step(**now, state=state)
            subject.close(out[:, 0], expected[order.to(expected.device), t], "a reordered state")
    return "sequences chosen twice and left out"


def _joined(first: Inputs, second: Inputs) -> Inputs:
    return {name: torch.cat([first[name], second[name]], 1) for name in first}


def stream(operator: CausalAttention, x: Inputs, prompt: int, mask: Tensor | None = None) -> Tensor:
    """Compute `prompt` tokens at once and the others one by one; return the outputs of all."""
    (batch, tokens, heads, dim_k), dim_v = x["q"].shape, x["v"].shape[3]
    parts = []
    if prompt:
        out, state = operator.prefill(**cut(x, 0, prompt), mask=mask)
        parts.append(out)
    else:
        place = {"device": x["q"].device, "dtype": x["q"].dtype}
        state = operator.init_state(batch, heads=heads, dim_k=dim_k, dim_v=dim_v, **place)
    for t in range(prompt, tokens):
        out, state = operator.step(**cut(x, t, t + 1), state=state)
        parts.append(out)
    return torch.cat(parts, dim=1)
