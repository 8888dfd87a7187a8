"""Multi-Head Linear Attention (arXiv 2601.07832) on Lightning.

One registry of attention operators, four model families, data in shards, results in TensorBoard.
"""

__version__ = "0.1.0"
