"""Draw images and videos with trained diffusion models."""
