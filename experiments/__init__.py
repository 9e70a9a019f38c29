"""Programs, each run as `python -m experiments.NAME --flag=...`, and the rooms below them."""
