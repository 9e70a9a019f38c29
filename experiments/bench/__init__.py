"""Benchmark cases and their measurement."""
