"""What programs share: flags, the run itself, files, requests."""
