"""Retrofits that come with the package, by name: `dms_jax.load(path, retrofit="smollm2-135m-cr4")`."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parents[1] / "experiments" / "results" / "retrofit"  # in a checkout and where a wheel installs


def names() -> list[str]:
  """The names of the retrofits that are there."""
  return sorted(config.parent.name for config in FOLDER.glob("*/config.json"))


def find(retrofit: str | Path) -> Path:
  """The folder of a retrofit: `retrofit` itself, or the shipped one of this name where there is no such folder."""
  path = Path(retrofit)
  return FOLDER / path if not path.exists() and str(path) in names() else path
