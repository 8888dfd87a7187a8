"""Generate tokens from a language model in batches, with torch alone.

A prompt gets the same continuation in any batch. Texts are in `continuation`.
"""

from mhla_lightning.inference.text.engine import CausalBackbone, Step, generate
from mhla_lightning.inference.text.sampling import Sampling
from mhla_lightning.inference.text.token_graph import Execution

__all__ = ["CausalBackbone", "Execution", "Sampling", "Step", "generate"]
