"""The language model of the paper around any causal operator.

Pre-norm layers, SwiGLU, tied embeddings (paper Sec. 5.4; SPEC section 5).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mhla_lightning.arguments.checked import CheckedOptions
from mhla_lightning.attention import (
    CausalSelfAttention,
    LayerAttention,
    LayerState,
    Packing,
    resolve_layers,
)
from mhla_lightning.attention.norm import RMSNorm
from mhla_lightning.backbones.activations import Activations, KeptActivations
from mhla_lightning.backbones.adapting import Grid, adapted_to, remember_geometry, source_geometry
from mhla_lightning.backbones.compiling import CompileModule, Parts
from mhla_lightning.backbones.layers import mixing_weights
from mhla_lightning.backbones.rotary import Rotation, rotations
from mhla_lightning.errors import UserError, inside
from mhla_lightning.weights.adapted import Adapted

_LAYER = {"heads": 4, "expand_k": 0.5, "expand_v": 1.0, "gate": True, "out_norm": True}
_LINEAR = {**_LAYER, "feature_map": "relu", "normalizer": "none", "chunk_size": 64}
# causal_local measured better than causal_uniform
_MHLA = {**_LINEAR, "max_chunks": 32, "mix_init": "causal_local"}
# Transformer++ with the same number of parameters: full-width keys instead of the gate. Its heads are 64
# wide, see `presets_for`.
_SOFTMAX = {"expand_k": 1.0, "expand_v": 1.0, "gate": False, "out_norm": False, "rotary": True}

_CONV = {"short_conv": 4}
# Every weight of the relative form starts at 1, which is token-gated retention; training then reduces the
# weights of distant chunks.
_GATED = {"mix_form": "relative", "mix_init": "causal_uniform", "decay": "token", "decay_span": "sequence"}

# Recurrent models have no rotary; their convolution is part of the model, except GLA's.
_RECURRENT = {**_LAYER, "rotary": False}
_RECURRENTS = {
    "gla": _RECURRENT,
    **{name: {**_RECURRENT, **_CONV} for name in ("deltanet", "gated_deltanet", "mamba2")},
}

LANGUAGE_PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "paper": {"softmax": _SOFTMAX, "linear": _LINEAR, "mhla": _MHLA, **_RECURRENTS},
    "release": {
        "softmax": _SOFTMAX,
        "linear": _LINEAR,
        "mhla": {**_MHLA, "mix_init": "causal_uniform", "mix_clamp": [1e-5, 1.0], "mix_clamp_at": "forward"},
        **_RECURRENTS,
    },
    "best": {
        "softmax": {**_SOFTMAX, **_CONV},
        "linear": {**_LINEAR, **_CONV, "decay": "token"},
        "mhla": {**_MHLA, **_CONV, **_GATED},
        **{name: {**row, **_CONV} for name, row in _RECURRENTS.items()},
    },
}
"""Preset -> operator -> options (SPEC section 9, LM)."""


def presets_for(embed_dim: int) -> dict[str, dict[str, dict[str, Any]]]:
    """Return LANGUAGE_PRESETS with softmax heads of 64 channels, 16 heads at 1,024.

    Args:
        embed_dim: channels; a model narrower than 64 has one head.
    """
    heads = max(1, embed_dim // 64)
    return {
        name: {**table, "softmax": {"heads": heads, **table["softmax"]}}
        for name, table in LANGUAGE_PRESETS.items()
    }


@dataclass(frozen=True)
class ModelState:
    """The model's memory of the tokens so far.

    Attributes:
        layers: one state a layer.
        positions: (batch,) int64, tokens seen of each sequence.
    """

    layers: tuple[LayerState, ...]
    positions: Tensor

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return self.positions.nbytes + sum(layer.bytes for layer in self.layers)

    def reorder(self, indices: Tensor) -> ModelState:
        """Return some of the sequences as a new batch.

        Args:
            indices: int64, any number, repeats allowed.
        """
        layers = tuple(layer.reorder(indices) for layer in self.layers)
        return ModelState(layers, self.positions.index_select(0, indices.to(self.positions.device)))


class SwiGLU(nn.Module):
    """W_down(SiLU(x W_gate) * x W_up), without biases.

    Args:
        dim: channels.
        hidden: channels inside.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

    def flops(self, tokens: int) -> int:
        return 2 * tokens * 3 * self.gate_proj.weight.numel()


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    Args:
        dim, context: the model's.
        hidden: channels inside the MLP.
        spec: this layer's resolved attention entry.
        norm_eps: of all norms.
        dropout: after attention and MLP.
    """

    def __init__(
        self, dim: int, hidden: int, spec: LayerAttention, context: int, norm_eps: float, dropout: float
    ) -> None:
        super().__init__()
        entry = {"norm_eps": norm_eps, "dropout": dropout, **spec.entry}
        self.attn_norm = RMSNorm(dim, eps=norm_eps)
        self.attn = CausalSelfAttention(dim, attention=entry, context=context)
        self.mlp_norm = RMSNorm(dim, eps=norm_eps)
        self.mlp = SwiGLU(dim, hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, *, rotary: Rotation | None = None, packing: Packing | None = None) -> Tensor:
        """Return a tensor of the shape of x, (batch, tokens, dim)."""
        return self._mlp(x + self.attn(self.attn_norm(x), rotary=rotary, packing=packing))

    def prefill(
        self, x: Tensor, *, rotary: Rotation | None = None, packing: Packing | None = None
    ) -> tuple[Tensor, LayerState]:
        """Return the output of `forward`, and the state after the last real token."""
        out, state = self.attn.prefill(self.attn_norm(x), rotary=rotary, packing=packing)
        return self._mlp(x + out), state

    def step(
        self, x: Tensor, state: LayerState, *, rotary: Rotation | None = None
    ) -> tuple[Tensor, LayerState]:
        """Return the output for one more token, (batch, 1, dim), and the new state."""
        out, state = self.attn.step(self.attn_norm(x), state, rotary=rotary)
        return self._mlp(x + out), state

    def flops(self, tokens: int) -> int:
        return self.attn.flops(tokens) + self.mlp.flops(tokens)

    def _mlp(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class DecoderStack(KeptActivations, nn.ModuleList):
    """The layers of a model, run one after another."""

    def forward(
        self,
        x: Tensor,
        turn: Mapping[int, Rotation],
        packing: Packing | None,
        hidden: list[Tensor] | None = None,
    ) -> Tensor:
        """Return a tensor of the shape of x, (batch, tokens, dim).

        Args:
            x: (batch, tokens, dim).
            turn: rotations by head dimension.
            packing: of a padded or packed batch; None means one document per row.
            hidden: takes the input of every layer; None records nothing.
        """
        with self.offloaded():
            for layer in self:
                _record(hidden, x)
                x = self.run(layer, x, rotary=turn.get(cast(DecoderLayer, layer).attn.dim_k), packing=packing)
        return x


@dataclass(frozen=True)
class CausalLMOptions(CheckedOptions):
    """Sizes of a :class:`CausalLM`.

    Args:
        vocab_size: V, token ids.
        context: tokens of a training row. A longer forward is allowed where the operators can.
        embed_dim: C, channels.
        depth: layers.
        intermediate: channels inside the MLP; None is 8/3 of embed_dim, rounded up to a multiple of 256.
        tie_embeddings: the output uses the embedding's weights.
        rope_base: the longest rotary wave is 2 pi times this.
        norm_eps: of all RMSNorms.
        dropout: after attention and MLP; an attention entry's own takes precedence.
    """

    vocab_size: int = 32000
    context: int = 2048
    embed_dim: int = 1024
    depth: int = 24
    intermediate: int | None = None
    tie_embeddings: bool = True
    rope_base: float = 10000.0
    norm_eps: float = 1e-6
    dropout: float = 0.0


class CausalLM(nn.Module):
    """A decoder whose layers hold any causal operator of the registry.

    Args:
        attention: attention entry: name, mapping, or a list of these cycled over the layers.
        options: sizes; None takes the defaults.

    Attributes:
        grid: (context,).

    Raises:
        UserError: a size that does not fit, or an attention entry that does not.
    """

    def __init__(
        self,
        attention: str | Mapping[str, Any] | Sequence[Any] = "mhla",
        options: CausalLMOptions | None = None,
    ) -> None:
        super().__init__()
        options = options or CausalLMOptions()
        dim, eps = options.embed_dim, options.norm_eps
        self.vocab_size, self.embed_dim = options.vocab_size, dim
        self.grid, self.rope_base = (options.context,), options.rope_base
        hidden = options.intermediate
        if hidden is None:
            hidden = 256 * math.ceil(int(dim * 4 * 2 / 3) / 256)
        layer_options = CausalSelfAttention.layer_options()
        with inside("attention"):
            specs = resolve_layers(attention, options.depth, presets_for(dim), layer_options, causal=True)
        self.embeddings = nn.Embedding(options.vocab_size, dim)
        self.layers = DecoderStack(
            DecoderLayer(dim, hidden, spec, options.context, eps, options.dropout) for spec in specs
        )
        self.norm = RMSNorm(dim, eps=eps)
        self.lm_head = None if options.tie_embeddings else nn.Linear(dim, options.vocab_size, bias=False)
        self.rotary_dims = tuple(sorted({layer.attn.dim_k for layer in self._layers() if layer.attn.rotary}))
        self._few_layouts = False
        self.apply(_initialise)
        remember_geometry(self)

    @property
    def head_weight(self) -> Tensor:
        """Weights of the output, (vocab_size, embed_dim)."""
        return self.embeddings.weight if self.lm_head is None else self.lm_head.weight

    def features(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        documents: Tensor | None = None,
        lengths: Tensor | None = None,
        hidden: list[Tensor] | None = None,
    ) -> Tensor:
        """Return the inputs of the output layer, (batch, tokens, embed_dim).

        Args:
            tokens: (batch, tokens) int64, or their embeddings, (batch, tokens, embed_dim).
            mask: (batch, tokens) bool, True = real token; padding is on the left or on the right.
            documents: (batch, tokens) int; a run of equal numbers is a document, and no token sees another
                document.
            lengths: of :func:`document_lengths`, on the host, so that nothing waits for the device.
            hidden: takes the input of every layer, and the result; None records nothing.
        """
        x = self._embedded(tokens)
        packing, turn = self._places(x, mask, documents, lengths)
        if hidden is None:
            return self.norm(self.layers(x, turn, packing))
        return _record(hidden, self.norm(self.layers(x, turn, packing, hidden)))

    def forward(self, tokens: Tensor, mask: Tensor | None = None, documents: Tensor | None = None) -> Tensor:
        """Return logits (batch, tokens, vocab_size); arguments as in `features`."""
        return F.linear(self.features(tokens, mask, documents), self.head_weight)

    def init_state(self, batch: int) -> ModelState:
        """Return the state before the first token of `batch` sequences."""
        positions = torch.zeros(batch, dtype=torch.int64, device=self.head_weight.device)
        return ModelState(tuple(layer.attn.init_state(batch) for layer in self._layers()), positions)

    def prefill(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        all_logits: bool = False,
        hidden: list[Tensor] | None = None,
    ) -> tuple[Tensor, ModelState]:
        """Run prompts at once; return logits and the state after each last real token.

        Args:
            tokens: (batch, tokens) int64, or their embeddings, (batch, tokens, embed_dim).
            mask: (batch, tokens) bool, True = real token.
            all_logits: return the logits of every token instead of the last real one.
            hidden: as in `features`; the last one holds the tokens that logits are returned for.

        Returns:
            logits (batch, vocab_size), or with `all_logits` (batch, tokens, vocab_size); the state.
        """
        x, states = self._embedded(tokens), []
        packing, turn = self._places(x, mask, None)
        for layer in self._layers():
            _record(hidden, x)
            x, state = layer.prefill(x, rotary=turn.get(layer.attn.dim_k), packing=packing)
            states.append(state)
        real = x.new_ones(x.shape[:2], dtype=torch.bool) if packing is None else packing.real
        if not all_logits:
            last = (real * torch.arange(x.shape[1], device=x.device)).amax(1)
            x = x[torch.arange(len(x), device=x.device), last]
        logits = F.linear(_record(hidden, self.norm(x)), self.head_weight)
        return logits, ModelState(tuple(states), real.sum(1))

    def step(
        self, tokens: Tensor, state: ModelState, hidden: list[Tensor] | None = None
    ) -> tuple[Tensor, ModelState]:
        """Return logits (batch, vocab_size) after one more token of each sequence, and the state.

        Args:
            tokens: (batch,) int64, or their embeddings, (batch, embed_dim).
            state: of the tokens before; may change in place.
            hidden: as in `features`; each is (batch, 1, embed_dim).
        """
        turn = self._rotations(state.positions[:, None])
        x, states = self._embedded(tokens)[:, None], []
        for layer, layer_state in zip(self._layers(), state.layers, strict=True):
            _record(hidden, x)
            x, new = layer.step(x, layer_state, rotary=turn.get(layer.attn.dim_k))
            states.append(new)
        x = self.norm(x[:, 0])
        _record(hidden, x[:, None])
        return F.linear(x, self.head_weight), ModelState(tuple(states), state.positions + 1)

    def fix_state(self, state: ModelState, tokens: int) -> None:
        """Prepare a state for steps that run without the host, where the layers have such steps.

        Args:
            state: changed in place.
            tokens: of a sequence at most, those of the state included.
        """
        for layer, own in zip(self._layers(), state.layers, strict=True):
            layer.attn.attention.fix_state(own.operator, tokens)

    def host_needed(self, state: ModelState) -> str | None:
        """Return why steps after this state need the host; None where they do not."""
        for number, (layer, own) in enumerate(zip(self._layers(), state.layers, strict=True)):
            if reason := layer.attn.attention.host_needed(own.operator):
                return f"layer {number} ({layer.attn.entry['name']}): {reason}"
        return None

    def check_length(self, tokens: int) -> None:
        """Refuse a sequence of more tokens than a layer takes. Raises UserError."""
        for layer in self._layers():
            layer.attn.attention.check_length(tokens)

    def flops(self, shape: Sequence[int]) -> int:
        """Return the forward FLOPs of one sample, 2 a multiply-add.

        Args:
            shape: (tokens,).
        """
        tokens = math.prod(shape)
        return (
            sum(layer.flops(tokens) for layer in self._layers())
            + 2 * tokens * self.embed_dim * self.vocab_size
        )

    def no_weight_decay(self) -> set[str]:
        """Return the names of the mixing matrices; norms and biases are never decayed (SPEC 1.4)."""
        return mixing_weights(self)

    def keep_activations(self, how: Activations) -> None:
        """Choose what the backward recomputes or fetches, see :data:`Activations`."""
        self.layers.keep_activations(how)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute every layer in the backward to save memory; timm's name."""
        self.keep_activations("blocks" if enable else "none")

    def compile_parts(self, what: Parts, compile_module: CompileModule) -> None:
        """Compile the stack of layers, or each layer.

        The layout of packed rows is computed outside, with one of few numbers of chunks.
        """
        self._few_layouts = True
        for part in [self.layers] if what == "whole" else self.layers:
            compile_module(part)

    def adapt_state_dict(self, state: Mapping[str, Tensor], grid: Grid = None) -> Adapted:
        """Return weights of other libraries under our names.

        Known are the MHLA authors', flash-linear-attention's and those of Hugging Face's Llama family. Mixing
        matrices over chunks of another size are left out.

        Args:
            state: the tensors.
            grid: geometry of the model that they come from; None takes what the state tells.

        Raises:
            UserError: a tensor that is not finite.
        """
        source = source_geometry(state, grid)
        renamed = {language_name(name): value for name, value in state.items()}
        adapted = Adapted((name, _our_shape(name, value)) for name, value in renamed.items())
        head, own = adapted.get("lm_head.weight"), adapted.get("embeddings.weight")
        if self.lm_head is None and head is not None:
            other = own is not None and not (own.shape == head.shape and torch.equal(own, head))
            adapted.omit("lm_head.weight", "here the output uses the embeddings", doubt=other)
        return adapted_to(self, adapted, source)

    def _embedded(self, tokens: Tensor) -> Tensor:
        return tokens if tokens.is_floating_point() else self.embeddings(tokens)

    def _layers(self) -> list[DecoderLayer]:
        return [cast(DecoderLayer, layer) for layer in self.layers]

    def _places(
        self,
        x: Tensor,
        mask: Tensor | None,
        documents: Tensor | None,
        lengths: Tensor | None = None,
    ) -> tuple[Packing | None, dict[int, Rotation]]:
        """Return the packing of a batch and the rotations of its positions, shared by all layers."""
        for name, given in (("mask", mask), ("documents", documents)):
            if given is not None and given.shape != x.shape[:2]:
                raise UserError(
                    name,
                    f"its shape {tuple(given.shape)} is not that of `tokens`, {tuple(x.shape[:2])}",
                )
        packing = Packing.of(mask, documents, lengths, few_layouts=self._few_layouts)
        if packing is not None:
            for layer in self._layers():
                layer.attn.attention.prepare(packing)
        positions = torch.arange(x.shape[1], device=x.device)[None] if packing is None else packing.positions
        return packing, self._rotations(positions)

    def _rotations(self, positions: Tensor) -> dict[int, Rotation]:
        return rotations(positions, self.rotary_dims, self.rope_base, self.embeddings.weight.dtype)


def _record(hidden: list[Tensor] | None, x: Tensor) -> Tensor:
    if hidden is not None:
        hidden.append(x)
    return x


def _initialise(module: nn.Module) -> None:
    """Initialise the weights that belong to one module itself (SPEC 5.1).

    Linear and Embedding N(0, 0.02) without scaling by depth, norms 1. An operator keeps its own
    initialisation.
    """
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, CausalSelfAttention):  # apply() visits children first
        module.reset_decay()


_OTHER_NAMES = (
    (r"^(model\.)+", ""),
    (r"^embed_tokens\.", "embeddings."),
    (r"\.self_attn\.", ".attn."),
    (r"\.input_layernorm\.", ".attn_norm."),
    (r"\.post_attention_layernorm\.", ".mlp_norm."),
    (r"\.attn\.mixing_matrix$", ".attn.attention.mixing.weight"),
    (r"\.attn\.(g_norm_swish_gate|g_norm)\.", ".attn.out_norm."),
    (r"\.attn\.([qkv])_conv1d\.", r".attn.convs.\1."),
)


def language_name(name: str) -> str:
    """Return our name of a parameter of another library; other names stay.

    Known are the release, flash-linear-attention and Hugging Face's Llama.
    """
    for pattern, ours in _OTHER_NAMES:
        name = re.sub(pattern, ours, name)
    return name


def _our_shape(name: str, value: Tensor) -> Tensor:
    """Flatten weights that others store with more axes.

    The release stores a mixing matrix as (L, L, 1, 1, 1, 1), flash-linear-attention a convolution as
    (channels, 1, width).
    """
    if name.endswith(".mixing.weight") and value.dim() > 3:
        return value.flatten(1)
    return value.flatten(1) if ".convs." in name and value.dim() == 3 else value
