"""Schemas of the files that dms_jax writes, the version in each, and the refusal of newer ones.

Every file that describes a folder states its schema ("format") and the version of dms_jax that wrote it ("version").
Earlier schemas stay readable: `tests/goldens` holds a folder of each, which tests load.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping
from typing import Any, Literal

from dms_jax.json_files import is_number, shown

Kind = Literal["checkpoint", "conversation", "run"]

# The schema that this version writes, and the newest that it reads.
SCHEMAS: dict[Kind, int] = {
  "checkpoint": 2,  # config.json; 1 (dms_jax 0.1, 0.2): no version and no "gates"
  "conversation": 2,  # cache.json; 1 (dms_jax 0.1, 0.2): no version; before 0.2 other names, see generation/files.py
  "run": 2,  # run.json of a retrofit, and its state; 1 (dms_jax 0.1, 0.2): no format and no version
}

_VERSION = re.compile(r"\d[\w.]{0,39}", re.ASCII)  # as pip takes one

try:
  VERSION = importlib.metadata.version("dms_jax")
except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
  VERSION = "unknown"


def stamp(kind: Kind) -> dict[str, Any]:
  """The first fields of a file: its schema and this version of dms_jax."""
  return {"format": SCHEMAS[kind], "version": VERSION}


def check(kind: Kind, values: Mapping[str, Any], source: Any) -> int:
  """The schema of a file's `values`; a file without one is of the first.

  Raises:
    ValueError: it is newer than this version reads, or no number; the message names `source` and what to install.
  """
  schema, newest = values.get("format", 1), SCHEMAS[kind]
  if not is_number(schema, int) or schema < 1:
    raise ValueError(f"{source}: format {shown(schema)} is no schema of dms_jax; the file is damaged")
  if schema > newest:
    writer = values.get("version")
    known = isinstance(writer, str) and _VERSION.fullmatch(writer)
    by, wanted = (f"dms_jax {writer}", f"'dms_jax>={writer}'") if known else ("a newer dms_jax", "dms_jax")
    what = f"written by {by}, schema {shown(schema)}; this version reads up to {newest}"
    raise ValueError(f"{source}: {what}: pip install -U {wanted}")
  return schema
