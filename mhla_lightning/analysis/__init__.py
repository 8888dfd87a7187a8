"""What attention does inside a trained model: rank, entropy, locality, maps."""
