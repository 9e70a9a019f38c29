"""Shared by all programs: flags, the run itself, files, requests."""
