"""Tokens from a language model: prompts in one batch, the same continuation in any batch. Torch alone, no
Lightning; texts are in `text`.
"""

from mhla_lightning.inference.text.engine import CausalBackbone, Step, generate
from mhla_lightning.inference.text.sampling import Sampling

__all__ = ["CausalBackbone", "Sampling", "Step", "generate"]
