"""A trained run put to use: find and rebuild it, continue text, draw images and videos."""
