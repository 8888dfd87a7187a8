"""Benchmarks of trained models."""
