"""The running SLURM, one for all tests of this folder."""

from tests.slurm.cluster import cluster

__all__ = ["cluster"]
