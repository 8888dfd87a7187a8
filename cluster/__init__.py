"""SLURM: site profiles, the batch script, and the commands around it. Imports no torch, so that its verbs
answer at once.
"""
