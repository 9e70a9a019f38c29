"""FastDMS's layout: a neuron gate in dms_metadata.json; each token decides about itself."""

from __future__ import annotations

from dms_jax.config import DMSConfig
from dms_jax.convert.layouts import nvidia

METADATA = "dms_metadata.json"


def gates(metadata: dict, source: str) -> DMSConfig:
  """The gates of dms_metadata.json; `metadata` is its content, with the settings at the top or under "config".

  Args:
    source: name of the checkpoint, for errors.

  Raises:
    ValueError: a value cannot be read, or the gates are of another kind.
  """
  if "sidecar" in metadata or metadata.get("schema_version", 1) not in (1, None):
    raise ValueError(f"{source}: {METADATA} of schema {metadata.get('schema_version')}: sidecar gates differ")
  return nvidia.from_keys({**metadata, **metadata.get("config", {})}, source, "neuron", shift=0, window=256)
