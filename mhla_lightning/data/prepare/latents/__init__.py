"""Images to shards of VAE latents."""
