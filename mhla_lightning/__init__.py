"""Multi-Head Linear Attention (arXiv 2601.07832) on Lightning: one attention registry, four model
families, shards in, TensorBoard out.
"""

__version__ = "0.1.0"
