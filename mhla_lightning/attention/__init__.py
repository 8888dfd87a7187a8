"""Token operators and the self-attention layer, for our backbones and for people's own models. Needs torch alone.

>>> import torch
>>> from mhla_lightning.attention import SelfAttention
>>> layer = SelfAttention(64, heads=2, grid=(8, 12), attention={"name": "mhla", "blocks": 4}, pos_conv="lepe3")
>>> layer(torch.randn(1, 96, 64)).shape
torch.Size([1, 96, 64])
"""

from mhla_lightning.attention.base import Attention
from mhla_lightning.attention.entry import ATTENTION, LayerAttention, build_attention, register_attention, resolve_layer, resolve_layers
from mhla_lightning.attention.layer import DepthwiseConv, SelfAttention
from mhla_lightning.attention.linear import Linear
from mhla_lightning.attention.mhla import MHLA, BlockGrid, MixingMatrix, block_summaries, dense_mhla, initial_mixing, mhla, mix, read
from mhla_lightning.attention.softmax import Softmax

__all__ = [
    "ATTENTION",
    "MHLA",
    "Attention",
    "BlockGrid",
    "DepthwiseConv",
    "LayerAttention",
    "Linear",
    "MixingMatrix",
    "SelfAttention",
    "Softmax",
    "block_summaries",
    "build_attention",
    "dense_mhla",
    "initial_mixing",
    "mhla",
    "mix",
    "read",
    "register_attention",
    "resolve_layer",
    "resolve_layers",
]
