"""FastDMS's layout: a neuron gate in a file of its own; each token decides about itself.

Released checkpoints hold dms_metadata.json. FastDMS's trainer writes the weights to OUT/final/, with a plain
config.json, and the settings of the gates to OUT/training_log.json. As in its loader, either file comes before the keys
of config.json.
"""

from __future__ import annotations

from pathlib import Path

from dms_jax.config import DMSConfig, read_json, shown
from dms_jax.convert.layouts import nvidia

METADATA, LOG = "dms_metadata.json", "training_log.json"


def find(path: Path) -> DMSConfig | None:
  """The gates of the checkpoint folder `path`; None without a file that holds them.

  Raises:
    ValueError: as `gates`.
  """
  if (path / METADATA).exists():
    return gates(read_json(path / METADATA), str(path))
  log = path.absolute().parent / LOG
  if not log.is_file():
    return None
  try:
    settings = read_json(log).get("config")
  except ValueError:  # other trainers write files of this name, too
    return None
  if isinstance(settings, dict) and {"alpha_scale", "alpha_offset", "window_size"} & set(settings):
    return gates({"config": settings}, str(log))
  return None


def gates(metadata: dict, source: str) -> DMSConfig:
  """The gates of dms_metadata.json; `metadata` is its content, with the settings at the top or under "config".

  Args:
    source: name of the checkpoint, for errors.

  Raises:
    ValueError: a value cannot be read, or the gates are of another kind.
  """
  if "sidecar" in metadata or metadata.get("schema_version", 1) not in (1, None):
    version = shown(metadata.get("schema_version"))
    raise ValueError(f"{source}: {METADATA} of schema {version}: sidecar gates differ")
  if not isinstance(metadata.get("config", {}), dict):
    raise ValueError(f"{source}: {METADATA}: config should be an object, found {shown(metadata['config'])}")
  return nvidia.from_keys({**metadata, **metadata.get("config", {})}, source, "neuron", shift=0, window=256)
