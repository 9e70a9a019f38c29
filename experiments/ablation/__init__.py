"""Ablations: sweeps, trials, and their report."""
