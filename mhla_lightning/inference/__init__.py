"""Find and rebuild a trained run, continue text, draw images and videos."""
