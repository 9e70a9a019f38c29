"""Methods on tasks: what is run, its records (one a chain), and their summary."""
