"""Programs: each is `python -m experiments.NAME --flag=...`; see `experiments.common.program` for what they share."""
