"""Arrays of .npz files: nothing is unpickled, and nothing that claims to exceed its file is read."""

from __future__ import annotations

import math
import zipfile
import zlib
from pathlib import Path

import numpy as np

# What reading a damaged archive raises, ValueError beside it.
DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, OSError, KeyError, NotImplementedError, RuntimeError)
_DEFLATED = 1032  # the most bytes that a byte of a deflated stream can stand for


class Arrays:
  """The arrays of an open archive by name.

  Args:
    path: of the archive, for its size.
    packed: arrays may be compressed.
  """

  def __init__(self, archive: zipfile.ZipFile, path: Path, packed: bool = False):
    self.archive, self.packed, self.size = archive, packed, path.stat().st_size
    self.names = set(archive.namelist())

  def __contains__(self, name: str) -> bool:
    return f"{name}.npy" in self.names

  def __getitem__(self, name: str) -> np.ndarray:
    """An array.

    Raises:
      ValueError: it is compressed where that is not expected, holds objects, or is not of the size that it claims.
    """
    about = self.archive.getinfo(f"{name}.npy")
    stored, most = about.compress_type == zipfile.ZIP_STORED, self.size * (_DEFLATED if self.packed else 1)
    if not (stored or self.packed) or about.file_size > most:
      raise ValueError(f"array '{name}' is compressed, or of {about.file_size} bytes in a file of {self.size}")
    with self.archive.open(about) as stream:
      version = np.lib.format.read_magic(stream)
      if version not in ((1, 0), (2, 0)):
        raise ValueError(f"array '{name}' is of format {version}")
      one = version == (1, 0)
      header = np.lib.format.read_array_header_1_0(stream) if one else np.lib.format.read_array_header_2_0(stream)
      claimed = math.prod(header[0]) * header[2].itemsize
      if header[2].hasobject or claimed != about.file_size - stream.tell():
        raise ValueError(f"array '{name}' claims {claimed} bytes and has {about.file_size - stream.tell()}")
      stream.seek(0)
      return np.lib.format.read_array(stream, allow_pickle=False)
