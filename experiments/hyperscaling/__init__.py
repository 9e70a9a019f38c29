"""Hyper-scaling: sweeps over W chains, L tokens and CR, their frontiers, margins and page."""
