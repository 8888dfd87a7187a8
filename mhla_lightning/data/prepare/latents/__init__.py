"""Images and clips to shards of VAE latents."""
