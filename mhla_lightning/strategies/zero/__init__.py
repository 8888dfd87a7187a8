"""DeepSpeed's ZeRO as a Lightning strategy, on GPUs and on CPUs."""
