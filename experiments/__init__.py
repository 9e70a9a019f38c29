"""Programs: each is `python -m experiments.NAME --flag=...`; see `experiments.program` for what they share."""
