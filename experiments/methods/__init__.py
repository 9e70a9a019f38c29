"""Methods under comparison, run on tasks."""
