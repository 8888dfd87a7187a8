"""What a recipe needs before it runs: memory, FLOPs, GPUs."""
