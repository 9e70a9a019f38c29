"""Grading of what models write: maths answers, and programs that are run."""
