"""Methods on tasks: running them, their records (one for each chain), and the summary."""
