"""Causal attention for language models: documents packed into rows, the layer, and the operators beside
MHLA.
"""
