"""A run: one process of it, and the whole of it."""
