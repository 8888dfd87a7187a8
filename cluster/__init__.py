"""SLURM: site profiles, the batch script and the calls around it.

No module here imports torch, so that the verbs answer at once.
"""
