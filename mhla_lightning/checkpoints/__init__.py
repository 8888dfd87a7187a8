"""Checkpoint folders: complete or not there at all."""
