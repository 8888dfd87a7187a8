"""Single tokens on the Triton kernel with their references, for the process of `interpreter.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mhla_lightning.attention import CausalAttention, build_attention
from mhla_lightning.attention.base import State
from mhla_lightning.attention.context import Rotary
from mhla_lightning.attention.mhla import CausalMHLA
from mhla_lightning.attention.mhla.decode import MHLAState
from mhla_lightning.backbones.rotary import rotations
from mhla_lightning.inference.text.token_graph import tensors_of

EPS = 1e-3  # of features and normalizer; large enough to matter


@dataclass(frozen=True)
class DecodeCase:
    """A batch that steps after its prompts.

    Attributes:
        prompts: tokens of every sequence's prompt; 0 everywhere starts from an empty state.
        steps: tokens after the prompts.
        dim, dim_v: channels a head.
        entry: of the attention entry.
        rotary: whether positions turn q and k.
        heads: one for what is long.
        dtype: of the tokens.
    """

    prompts: tuple[int, ...]
    steps: int
    dim: int
    dim_v: int
    entry: Mapping[str, Any] = field(default_factory=dict)
    rotary: bool = False
    heads: int = 2
    dtype: torch.dtype = torch.float32

    @property
    def label(self) -> str:
        """The name of the case in a test's id."""
        dtype = str(self.dtype).removeprefix("torch.")
        said = [f"{key}={value}" for key, value in self.entry.items()]
        return "-".join(
            [
                "_".join(map(str, self.prompts)),
                f"d{self.dim}",
                f"v{self.dim_v}",
                dtype,
                *["rotary"] * self.rotary,
                *said,
            ]
        )

    def operator(self, kernel: str) -> CausalAttention:
        """Return the operator, always with the same numbers."""
        torch.manual_seed(0)
        entry = {"name": "mhla", "eps": EPS, "feature_map": "relu_eps", "kernel": kernel, **self.entry}
        built = build_attention(entry, heads=self.heads, dim_k=self.dim, dim_v=self.dim_v, causal=True)
        assert isinstance(built, CausalAttention)
        if isinstance(built, CausalMHLA):
            with torch.no_grad():
                built.mixing.weight.uniform_(0.1, 1)
        return built

    def turn(self, positions: Tensor, dtype: torch.dtype) -> Rotary | None:
        """Return the rotary of some positions, (batch, tokens)."""
        return rotations(positions, [self.dim], 100.0, dtype)[self.dim] if self.rotary else None


@torch.no_grad()
def decode_errors(case: DecodeCase) -> tuple[float, float]:
    """Return the errors of the kernel and of the torch step in float32.

    Both are relative to the largest value of the reference, the forward over whole sequences in float64.
    """
    torch.manual_seed(1)
    longest = max(case.prompts) + case.steps
    shapes = [(len(case.prompts), longest, case.heads, dim) for dim in (case.dim, case.dim, case.dim_v)]
    q, k, v = (torch.randn(shape).to(case.dtype) for shape in shapes)
    logs = -0.5 * torch.rand(len(case.prompts), longest, case.heads)
    inputs = [q, k, v, logs]
    reference = case.operator("torch").double()
    whole = [
        _whole(reference, case, [x[b : b + 1, : n + case.steps].double() for x in inputs], n)
        for b, n in enumerate(case.prompts)
    ]
    want = torch.cat(whole)
    got = _stepped(case.operator("triton"), case, inputs)
    beside = _stepped(case.operator("torch"), case, [x.float() for x in inputs])
    return _relative(got, want), _relative(beside, want)


@torch.no_grad()
def prefill_errors(case: DecodeCase) -> dict[str, float]:
    """Return the errors of the outputs and of every tensor of the state after the prompts.

    They are relative to the largest value of the reference: the tokens one by one, on torch in float64.
    """
    torch.manual_seed(1)
    most, prompts = max(case.prompts), torch.tensor(case.prompts)
    shapes = [(len(prompts), most, case.heads, dim) for dim in (case.dim, case.dim, case.dim_v)]
    inputs = [torch.randn(shape).to(case.dtype) for shape in shapes]
    logs = -0.5 * torch.rand(len(prompts), most, case.heads)
    kernels, reference = case.operator("triton"), case.operator("torch").double()
    positions = torch.arange(most).expand(len(prompts), -1)
    real = positions < prompts[:, None]
    rotary, decay = case.turn(positions, torch.float32), logs if kernels.token_decay else None
    q, k, v = inputs
    out, got = kernels.prefill(q, k, v, mask=real, rotary=rotary, log_decay=decay)
    found: dict[str, float] = {}
    for b, length in enumerate(case.prompts):
        sizes = {"heads": case.heads, "dim_k": case.dim, "dim_v": case.dim_v}
        state: State = reference.init_state(1, **sizes, device="cpu", dtype=torch.float64)
        outs = []
        for t in range(length):
            rotary = case.turn(torch.tensor([[t]]), torch.float64)
            decay = logs[b : b + 1, t : t + 1].double() if kernels.token_decay else None
            q, k, v = (x[b : b + 1, t : t + 1].double() for x in inputs)
            step, state = reference.step(q, k, v, state, rotary=rotary, log_decay=decay)
            outs.append(step)
        pairs = {"out": (out[b : b + 1, :length], torch.cat(outs, 1))} if outs else {}
        row = got.reorder(torch.tensor([b]))
        for each in (row, state):
            if isinstance(each, MHLAState) and not each.filled[0]:
                for part in each.parts():
                    part.mixed.zero_()  # of the chunk before, and not read again
        pairs |= {str(n): pair for n, pair in enumerate(zip(tensors_of(row), tensors_of(state), strict=True))}
        for name, (ours, theirs) in pairs.items():
            if ours.dim() > 2 and ours.shape != theirs.shape:  # rings grow in other steps
                places = min(ours.shape[2], theirs.shape[2])
                assert not ours[:, :, places:].any()
                assert not theirs[:, :, places:].any()
                ours, theirs = ours[:, :, :places], theirs[:, :, :places]  # noqa: PLW2901
            if theirs.numel():
                scale = float(theirs.abs().max()) or 1.0
                error = float((ours.double() - theirs).abs().max()) / scale
                found[name] = max(found.get(name, 0.0), error)
    return found


def _whole(operator: CausalAttention, case: DecodeCase, inputs: list[Tensor], prompt: int) -> Tensor:
    q, k, v, logs = inputs
    rotary = case.turn(torch.arange(q.shape[1])[None], torch.float64)
    decay = logs if operator.token_decay else None
    return operator(q, k, v, rotary=rotary, log_decay=decay)[:, prompt:]


def _stepped(operator: CausalAttention, case: DecodeCase, inputs: list[Tensor]) -> Tensor:
    """Return (batch, steps, heads, dim_v) after a prefill of all prompts, with padding at the right."""
    most, prompts = max(case.prompts), torch.tensor(case.prompts)
    if most:
        real = torch.arange(most) < prompts[:, None]
        positions = torch.arange(most).expand(len(prompts), -1)
        given = [x[:, :most] for x in inputs]
        q, k, v, logs = given
        decay = logs if operator.token_decay else None
        rotary = case.turn(positions, torch.float32)
        _, state = operator.prefill(q, k, v, mask=real, rotary=rotary, log_decay=decay)
    else:
        state = operator.init_state(
            len(prompts),
            heads=case.heads,
            dim_k=case.dim,
            dim_v=case.dim_v,
            device="cpu",
            dtype=torch.float32,
        )
    outs, rows = [], torch.arange(len(prompts))
    for step in range(case.steps):
        at = prompts + step
        q, k, v, logs = (x[rows, at][:, None] for x in inputs)
        decay = logs if operator.token_decay else None
        rotary = case.turn(at[:, None], torch.float32)
        out, state = operator.step(q, k, v, state, rotary=rotary, log_decay=decay)
        outs.append(out)
    return torch.cat(outs, 1)


def _relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).abs().max() / want.abs().max())
