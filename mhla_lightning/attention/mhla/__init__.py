"""Multi-Head Linear Attention: blocks, mixing matrix, reference, operator."""

from mhla_lightning.attention.mhla.bidirectional import block_summaries, mhla, mix, read
from mhla_lightning.attention.mhla.grid import BlockGrid
from mhla_lightning.attention.mhla.mixing import MixingMatrix, initial_mixing
from mhla_lightning.attention.mhla.operator import MHLA
from mhla_lightning.attention.mhla.reference import dense_mhla

__all__ = ["MHLA", "BlockGrid", "MixingMatrix", "block_summaries", "dense_mhla", "initial_mixing", "mhla", "mix", "read"]
