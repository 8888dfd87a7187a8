"""One HTML page about runs or a comparison, which opens from disk without a network."""
