"""Layers around any operator: projections, rotary positions, gates, convolutions."""
