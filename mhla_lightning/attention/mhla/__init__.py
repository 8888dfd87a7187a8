"""Multi-Head Linear Attention: blocks, mixing matrix, reference, operators."""

from mhla_lightning.attention.mhla.bidirectional import block_summaries, mhla, mix, read
from mhla_lightning.attention.mhla.causal import attend_in_chunks, causal_mhla, prefill_in_chunks
from mhla_lightning.attention.mhla.causal_operator import CausalMHLA, CausalMHLAOptions
from mhla_lightning.attention.mhla.cross import CrossMixingMatrix, cross_mhla
from mhla_lightning.attention.mhla.decode import MHLAState, init_state, step_state
from mhla_lightning.attention.mhla.grid import BlockGrid
from mhla_lightning.attention.mhla.mixing import MixingInit, MixingMatrix, initial_mixing
from mhla_lightning.attention.mhla.operator import MHLA, MHLAOptions
from mhla_lightning.attention.mhla.reference import dense_cross_mhla, dense_mhla
from mhla_lightning.attention.mhla.rule import CausalFeatures, CausalRule

__all__ = [
    "MHLA",
    "BlockGrid",
    "CausalFeatures",
    "CausalMHLA",
    "CausalMHLAOptions",
    "CausalRule",
    "CrossMixingMatrix",
    "MHLAOptions",
    "MHLAState",
    "MixingInit",
    "MixingMatrix",
    "attend_in_chunks",
    "block_summaries",
    "causal_mhla",
    "cross_mhla",
    "dense_cross_mhla",
    "dense_mhla",
    "init_state",
    "initial_mixing",
    "mhla",
    "mix",
    "prefill_in_chunks",
    "read",
    "step_state",
]
