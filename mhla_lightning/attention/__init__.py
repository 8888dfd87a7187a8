"""Token operators and the self-attention layers around them.

They serve our backbones and other people's models, and need nothing but torch.

>>> import torch
>>> from mhla_lightning.attention import SelfAttention
>>> entry = {"name": "mhla", "blocks": 4, "pos_conv": "lepe3"}
>>> layer = SelfAttention(64, heads=2, grid=(8, 12), attention=entry)
>>> layer(torch.randn(1, 96, 64)).shape
torch.Size([1, 96, 64])
"""

from mhla_lightning.attention.base import Attention, CausalAttention, State
from mhla_lightning.attention.baselines.linear import Linear
from mhla_lightning.attention.baselines.softmax import Softmax
from mhla_lightning.attention.context import Context, Rotary
from mhla_lightning.attention.entry import (
    ATTENTION,
    CAUSAL_ATTENTION,
    LayerAttention,
    build_attention,
    register_attention,
    resolve_layer,
    resolve_layers,
)
from mhla_lightning.attention.layers.causal_self_attention import (
    CausalLayerOptions,
    CausalSelfAttention,
    LayerState,
)
from mhla_lightning.attention.layers.cross_attention import CrossAttentionOptions, MHLACrossAttention
from mhla_lightning.attention.layers.entries import attention_entries
from mhla_lightning.attention.layers.outputs import attention_outputs
from mhla_lightning.attention.layers.self_attention import DepthwiseConv, LayerOptions, SelfAttention
from mhla_lightning.attention.mhla import (
    MHLA,
    BlockGrid,
    CausalFeatures,
    CausalRule,
    CrossMixingMatrix,
    MixingInit,
    MixingMatrix,
    block_summaries,
    causal_mhla,
    cross_mhla,
    dense_cross_mhla,
    dense_mhla,
    init_state,
    initial_mixing,
    mhla,
    mix,
    read,
    step_state,
)
from mhla_lightning.attention.packing import Packing

__all__ = [
    "ATTENTION",
    "CAUSAL_ATTENTION",
    "MHLA",
    "Attention",
    "BlockGrid",
    "CausalAttention",
    "CausalFeatures",
    "CausalLayerOptions",
    "CausalRule",
    "CausalSelfAttention",
    "Context",
    "CrossAttentionOptions",
    "CrossMixingMatrix",
    "DepthwiseConv",
    "LayerAttention",
    "LayerOptions",
    "LayerState",
    "Linear",
    "MHLACrossAttention",
    "MixingInit",
    "MixingMatrix",
    "Packing",
    "Rotary",
    "SelfAttention",
    "Softmax",
    "State",
    "attention_entries",
    "attention_outputs",
    "block_summaries",
    "build_attention",
    "causal_mhla",
    "cross_mhla",
    "dense_cross_mhla",
    "dense_mhla",
    "init_state",
    "initial_mixing",
    "mhla",
    "mix",
    "read",
    "register_attention",
    "resolve_layer",
    "resolve_layers",
    "step_state",
]
