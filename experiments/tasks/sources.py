"""Data sets of tasks: a file that a flag names, or one of the hub; JSON lines or Parquet.

`--math500.data=hub:HuggingFaceH4/MATH-500` downloads the file that the task reads, into the hub's own cache.
`hub:OWNER/NAME@REVISION` fixes the version, and `hub:OWNER/NAME/PATH` names another file of the data set. The hub needs
the extra `hub` (huggingface_hub; pyarrow for Parquet).
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.common.files import json_records, required

HUB = "hub:"
_HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(/(?P<file>[^@]+))?(@(?P<revision>[\w./-]+))?")


def located(flag: str, value: str, what: str, names: Sequence[str]) -> Path:
  """The file that a flag names, downloaded first if it is one of the hub.

  Args:
    what: describes the file in errors.
    names: patterns of the file's path inside a data set of the hub, the preferred one first.

  Raises:
    ValueError: no path is given, nothing is there, or the hub could not give it.
  """
  return _from_hub(flag, value, names) if value.startswith(HUB) else required(flag, value, what)


def _from_hub(flag: str, value: str, names: Sequence[str]) -> Path:
  if (asked := _HUB_ID.fullmatch(value.removeprefix(HUB))) is None:
    raise ValueError(f"--{flag}={value}: a data set of the hub is hub:OWNER/NAME, hub:OWNER/NAME/PATH or ...@REVISION")
  try:
    import huggingface_hub
  except ImportError:
    raise ValueError(f"--{flag}={value} needs huggingface_hub: pip install 'dms_jax[hub]'") from None
  about = {"repo_id": asked["name"], "repo_type": "dataset", "revision": asked["revision"]}
  try:
    file = asked["file"] or _choose(flag, value, huggingface_hub.HfApi().list_repo_files(**about), names)
    return Path(huggingface_hub.hf_hub_download(filename=file, **about))
  except _NoSuchFile:
    raise
  except Exception as error:  # of the library or of the network
    message = (str(error).strip().splitlines() or [type(error).__name__])[0]
    raise ValueError(f"--{flag}={value}: the hub could not give it: {message}") from None


class _NoSuchFile(ValueError):
  """The data set has no file of the name expected."""


def _choose(flag: str, value: str, files: Sequence[str], names: Sequence[str]) -> str:
  """The only file that matches the first of `names` that any file matches."""
  for pattern in names:
    if len(found := fnmatch.filter(files, pattern)) == 1:
      return found[0]
    if found:
      raise _NoSuchFile(f"--{flag}={value}: has {len(found)} files {pattern}; name one, as in {value}/{found[0]}")
  raise _NoSuchFile(f"--{flag}={value}: has no file {' or '.join(names)}; name another, as in {value}/PATH")


def records(flag: str, path: Path, fields: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
  """(where, record) of each record of a file of JSON lines, or of a Parquet file (.parquet).

  Args:
    fields: the name and type of each field that every record must hold.

  Raises:
    ValueError: a malformed record, a record without one of `fields`, or no record; names the flag, file and line.
  """
  found = _rows(flag, path, fields) if path.suffix == ".parquet" else list(json_records(flag, path, fields))
  if not found:
    raise ValueError(f"--{flag}={path}: holds no record")
  return found


def _rows(flag: str, path: Path, fields: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
  try:
    from pyarrow import ArrowException, parquet
  except ImportError:
    raise ValueError(f"--{flag}={path}: Parquet files need pyarrow: pip install 'dms_jax[hub]'") from None
  try:
    rows = parquet.read_table(path).to_pylist()
  except (OSError, ValueError, ArrowException) as error:
    raise ValueError(f"--{flag}={path}: not a Parquet file ({' '.join(str(error).split())})") from None
  for number, row in enumerate(rows, 1):
    for name, kind in fields.items():
      if not isinstance(row.get(name), kind):
        raise ValueError(f"--{flag}={path}, row {number}: a record needs {name!r} ({getattr(kind, '__name__', kind)})")
  return [(f"--{flag}={path}, row {number}", row) for number, row in enumerate(rows, 1)]
