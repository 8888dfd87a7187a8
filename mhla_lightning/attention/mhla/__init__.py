"""Multi-Head Linear Attention: blocks, mixing matrix, reference, operator."""

from mhla_lightning.attention.mhla.bidirectional import block_summaries, mhla, mix, read
from mhla_lightning.attention.mhla.causal import causal_mhla
from mhla_lightning.attention.mhla.causal_operator import CausalMHLA
from mhla_lightning.attention.mhla.decode import MHLAState, init_state, step_state
from mhla_lightning.attention.mhla.grid import BlockGrid
from mhla_lightning.attention.mhla.mixing import MixingMatrix, initial_mixing
from mhla_lightning.attention.mhla.operator import MHLA
from mhla_lightning.attention.mhla.reference import dense_mhla

__all__ = [
    "MHLA",
    "BlockGrid",
    "CausalMHLA",
    "MHLAState",
    "MixingMatrix",
    "block_summaries",
    "causal_mhla",
    "dense_mhla",
    "init_state",
    "initial_mixing",
    "mhla",
    "mix",
    "read",
    "step_state",
]
