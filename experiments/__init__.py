"""Programs, each run as `python -m experiments.NAME --flag=...`, and packages that they share."""
