"""The flags `--mesh.*` of programs that run models, on the devices of one process or several."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from jax.sharding import Mesh

from dms_jax.processes import leads, together
from dms_jax.retrofit import distributed
from dms_jax.retrofit.distributed import MeshConfig
from experiments.common import outputs, program


def define() -> None:
  """Defines the flags, those that training has."""
  program.define_flags("mesh", MeshConfig)


def asked() -> bool:
  """Whether the flags ask for a mesh; connects to no process."""
  config = program.read_flags("mesh", MeshConfig)
  return bool(config.coordinator) or config.data * config.tensor != 1


def read() -> Mesh | None:
  """The mesh of the flags; None for one device. Over several processes it connects them; only process 0 then speaks.

  Raises:
    ValueError: there are fewer devices, the processes cannot connect, or their devices are not all in the mesh.
  """
  config = program.read_flags("mesh", MeshConfig)
  if config.coordinator:
    jax.config.update("jax_enable_preemption_service", False)  # SIGTERM ends the process
  distributed.initialize(config)
  if config.coordinator and not leads():
    program.silence()
  return distributed.mesh_of_all(config) if asked() else None


@contextlib.contextmanager
def locked_by_first(path: str | Path, kind: Literal["folder", "file"] = "folder") -> Iterator[None]:
  """`outputs.locked` of `--output`, which process 0 takes for all processes of this run."""
  with contextlib.ExitStack() as stack:
    with together():
      if leads():
        stack.enter_context(outputs.locked("output", path, kind))
    yield


@contextlib.contextmanager
def written_alone(path: str | Path, kind: Literal["folder", "file"] = "folder") -> Iterator[Path]:
  """Keeps other runs from writing to `--output` (`outputs.locked`); yields where this process reads and writes it.

  Process 0 of several has `path` itself. The others have a copy, which goes with them, so each finds the same results
  there and does the same work.

  Raises:
    ValueError: another run writes there, `path` is not given, or processes find other files there.
  """
  if not jax.distributed.is_initialized():
    with outputs.locked("output", path, kind):
      yield Path(path)
    return
  if kind == "folder" and not program.FLAGS.output:
    raise ValueError("--mesh.coordinator: give --output on a shared file system, where each process finds the results")
  path = Path(path)
  with locked_by_first(path, kind), contextlib.ExitStack() as stack:
    with together():
      own = path if leads() else Path(stack.enter_context(tempfile.TemporaryDirectory())) / path.name
      if not leads() and path.exists():
        (shutil.copytree if path.is_dir() else shutil.copyfile)(path, own)
    with together():
      if not _alike(own):
        raise ValueError(f"--output={path}: processes find other files there; it must be on a shared file system")
    yield own


def _alike(path: Path) -> bool:
  """Whether all processes find the same files."""
  from jax.experimental import multihost_utils

  there = sorted(path.rglob("*")) if path.is_dir() else [path] if path.exists() else []
  crc = 0
  for file in there:
    if file.is_file() and not file.name.startswith("."):
      crc = zlib.crc32(file.read_bytes(), zlib.crc32(file.relative_to(path.parent).as_posix().encode(), crc))
  found = multihost_utils.process_allgather(np.uint32(crc))
  return bool((found == crc).all())
