"""Images and videos drawn from trained diffusion models."""
