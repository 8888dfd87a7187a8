"""Layers around any operator: projections, norms, gates, convolutions."""
