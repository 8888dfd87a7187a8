"""Rows of language models in the modelled table: training, and one more token.

See `kernel_launches.py` for how they are counted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mhla_lightning.attention import build_attention
from mhla_lightning.attention.context import HalfRotary
from mhla_lightning.attention.mhla import CausalMHLA
from mhla_lightning.attention.mhla.decode import MHLAState, make_room
from mhla_lightning.attention.mhla.triton.choice import CausalSizes, causal_dense_is_cheaper
from mhla_lightning.attention.mhla.triton.launch import Launch, recorded
from mhla_lightning.bench.kernel_launches import (
    Gpu,
    Operations,
    Work,
    flash_forward_seconds,
    flash_seconds,
    torch_operations,
)


class _MetaHalves(HalfRotary):
    """Rotary positions of a language model, as tables without data."""

    def __init__(self, batch: int, tokens: int, dim: int) -> None:
        self.cos, self.sin = (torch.empty(batch, tokens, 1, dim // 2, device="meta") for _ in range(2))

    def __call__(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        halves = first * self.cos - second * self.sin, second * self.cos + first * self.sin
        return torch.cat(halves, dim=-1).to(x.dtype)


@dataclass(frozen=True)
class LanguageSizes:
    """Sizes of lm_340m.

    Attributes:
        batch: sequences.
        heads, dim_k, dim_v: of a layer.
        size, blocks: tokens per chunk, and chunks of the mixing matrix.
    """

    batch: int
    heads: int = 4
    dim_k: int = 128
    dim_v: int = 256
    size: int = 64
    blocks: int = 32

    @property
    def tokens(self) -> int:
        """Tokens of a row."""
        return self.size * self.blocks

    def operator(self) -> CausalMHLA:
        """Return the operator on the torch path."""
        entry = {"name": "mhla", "kernel": "torch", "chunk_size": self.size, "max_chunks": self.blocks}
        built = build_attention(entry, heads=self.heads, dim_k=self.dim_k, dim_v=self.dim_v, causal=True).to(
            "meta"
        )
        assert isinstance(built, CausalMHLA)
        return built

    def inputs(self, tokens: int) -> list[Tensor]:
        """Return q, k and v in bf16."""
        return [
            torch.empty(self.batch, tokens, self.heads, dim, dtype=torch.bfloat16, device="meta")
            for dim in (self.dim_k, self.dim_k, self.dim_v)
        ]

    def token_bytes(self, tokens: int) -> int:
        """Return the bytes of q, k, v and the output in bf16."""
        return 4 * self.batch * self.heads * tokens * (self.dim_k + self.dim_v)


@dataclass(frozen=True)
class TrainingCase:
    """Forward and backward of one layer's operator over whole rows.

    Attributes:
        name: shown in tables.
        sizes: of the call.
        rotary: whether positions turn q and k.
    """

    name: str
    sizes: LanguageSizes
    rotary: bool = True

    @property
    def form(self) -> str:
        """The form that `auto` takes."""
        s = self.sizes
        sizes = CausalSizes(s.batch * s.heads, s.blocks, s.size, s.dim_k, s.dim_v)
        return "dense" if causal_dense_is_cheaper(sizes) else "chunks"

    def torch_work(self) -> tuple[list[Work], list[Work]]:
        """Return the kernels of the torch path, forward and backward."""
        operator, s = self.sizes.operator(), self.sizes
        q, k, v = (x.requires_grad_() for x in s.inputs(s.tokens))
        rotary = _MetaHalves(1, s.tokens, s.dim_k) if self.rotary else None
        return torch_operations(operator, (q, k, v), rotary)

    def recorded_call(self, major: int) -> list[tuple[list[Launch], list[Work]]]:
        """Return launches and operations of torch, forward and backward."""
        from mhla_lightning.attention.mhla.triton import causal
        from mhla_lightning.attention.mhla.triton.terms import causal_terms

        operator, s = self.sizes.operator(), self.sizes
        q, k, v = s.inputs(s.tokens)
        grad = torch.empty_like(v)
        rotary = _MetaHalves(1, s.tokens, s.dim_k) if self.rotary else None
        plan = causal.CausalPlan(s.size, self.form == "chunks", 0.0)
        with recorded(major) as launches, Operations() as operations:
            terms = causal_terms(q, operator.mixing(), operator.rule, None, None, rotary)
            with torch.no_grad():
                saved = causal.forward(q, k, v, terms, plan)
        forward = list(launches), operations.found
        with recorded(major) as launches, Operations() as operations:
            with torch.no_grad():
                d_weights = causal.backward(grad, (q, k, v), terms, saved, plan)[3]
            terms.weights.backward(d_weights)
        return [forward, (list(launches), operations.found)]

    def flash_seconds(self, gpu: Gpu) -> float:
        """Return causal FlashAttention's modelled time, forward and backward."""
        s = self.sizes
        flops = s.batch * s.heads * s.tokens**2 * (s.dim_k + s.dim_v)
        return flash_seconds(flops, s.token_bytes(s.tokens), gpu)


@dataclass(frozen=True)
class PromptCase:
    """Outputs of prompts of half a context and the state after them, in one layer's operator.

    Attributes:
        name: shown in tables.
        sizes: of the call.
    """

    name: str
    sizes: LanguageSizes

    @property
    def form(self) -> str:
        """The form that `auto` takes."""
        return TrainingCase(self.name, replace(self.sizes, blocks=self.sizes.blocks // 2)).form

    @property
    def tokens(self) -> int:
        """Tokens of a prompt."""
        return self.sizes.tokens // 2

    @torch.no_grad()
    def torch_work(self) -> tuple[list[Work], list[Work]]:
        """Return the kernels of the torch path; there is no backward."""
        operator, s = self.sizes.operator(), self.sizes
        with Operations() as operations:
            q, k, v = s.inputs(self.tokens)
            operator.prefill(q, k, v, rotary=_MetaHalves(1, self.tokens, s.dim_k))
        return operations.found, []

    @torch.no_grad()
    def recorded_call(self, major: int) -> list[tuple[list[Launch], list[Work]]]:
        """Return launches and operations of torch; there is no backward."""
        from mhla_lightning.attention.mhla.triton import causal
        from mhla_lightning.attention.mhla.triton.prefill import state_of_prompt
        from mhla_lightning.attention.mhla.triton.terms import causal_terms

        operator, s = self.sizes.operator(), self.sizes
        q, k, v = s.inputs(self.tokens)
        rotary, plan = (
            _MetaHalves(1, self.tokens, s.dim_k),
            causal.CausalPlan(s.size, self.form == "chunks", 0.0),
        )
        with recorded(major) as launches, Operations() as operations:
            mixing = operator.mixing()
            terms = causal_terms(q, mixing, operator.rule, None, None, rotary)
            causal.forward(q, k, v, terms, plan)
            state_of_prompt(k, v, terms, mixing, operator.rule, None, None, 0.0)
        return [(list(launches), operations.found), ([], [])]

    def flash_seconds(self, gpu: Gpu) -> float:
        """Return causal FlashAttention's modelled time, forward alone."""
        s = self.sizes
        flops = s.batch * s.heads * self.tokens**2 * (s.dim_k + s.dim_v)
        return flash_forward_seconds(flops, s.token_bytes(self.tokens), gpu)


@dataclass(frozen=True)
class TokenCase:
    """One more token of every sequence at the end of its context, in all layers' operators.

    Attributes:
        name: shown in tables.
        sizes: of the call.
        begins: whether the token begins a chunk, and so mixes all earlier ones.
        layers: operators.
    """

    name: str
    sizes: LanguageSizes
    begins: bool = False
    layers: int = 24

    @property
    def form(self) -> str:
        """The kernel has one."""
        return "token"

    def state(self) -> MHLAState:
        """Return the state in the last chunk of the context."""
        s = self.sizes
        state = s.operator().init_state(
            s.batch, heads=s.heads, dim_k=s.dim_k, dim_v=s.dim_v, device="meta", dtype=torch.float32
        )
        assert isinstance(state, MHLAState)
        state.filled, state.finished = [0 if self.begins else 1] * s.batch, [s.blocks - 1] * s.batch
        make_room(state, state.reach.kept)
        return state

    @torch.no_grad()
    def torch_work(self) -> tuple[list[Work], list[Work]]:
        """Return the kernels of the torch path; there is no backward."""
        operator, s, state = self.sizes.operator(), self.sizes, self.state()
        with Operations() as operations:
            q, k, v = s.inputs(1)
            operator.step(q, k, v, state, rotary=_MetaHalves(s.batch, 1, s.dim_k))
        return operations.found * self.layers, []

    @torch.no_grad()
    def recorded_call(self, major: int) -> list[tuple[list[Launch], list[Work]]]:
        """Return launches and operations of torch; there is no backward."""
        from mhla_lightning.attention.mhla.triton.decode import Token, step_chunks

        operator, s, state = self.sizes.operator(), self.sizes, self.state()
        state.count_on_device()
        q, k, v = (x[:, 0] for x in s.inputs(1))
        token = Token(q, k, v, 0.0, _MetaHalves(s.batch, 1, s.dim_k), None, v.dtype)
        with recorded(major) as launches, Operations() as operations:
            step_chunks(state, token, operator.mixing())
        if self.begins:  # a launch does not know what the counters on the device say
            launches[0] = replace(launches[0], reads=(*launches[0].reads, "ring"))
        return [(list(launches) * self.layers, operations.found * self.layers), ([], [])]

    def flash_seconds(self, gpu: Gpu) -> float:
        """Return the time in which softmax attention reads its cache of the whole context."""
        size = self.sizes.token_bytes(self.sizes.tokens) // 2  # no q and no output
        return self.layers * max(size / gpu.bytes, gpu.least)


LANGUAGE_CASES = (
    TrainingCase("lm_340m, 16 x 2,048", LanguageSizes(16)),
    PromptCase("lm_340m, prompts 16 x 1,024", LanguageSizes(16)),
    TokenCase("lm_340m, a token, batch 64, 24 layers", LanguageSizes(64)),
    TokenCase("lm_340m, a token that begins a chunk", LanguageSizes(64), begins=True),
)
