"""Benchmarks of speed and memory: `pixeldip bench`."""
