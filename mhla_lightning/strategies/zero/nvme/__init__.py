"""ZeRO-3 with its state on a local disk (experimental)."""
