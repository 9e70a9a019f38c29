# Installs dms_jax, where it is not there yet: of a checkout, or from the repository's address.
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

REPOSITORY = os.environ.get("NOTEBOOK_REPOSITORY", "{url}")
DEVICE = (
  "tpu"
  if Path("/dev/accel0").exists() or Path("/dev/vfio/0").exists()
  else "cuda"
  if shutil.which("nvidia-smi")
  else ""
)


def versions():
  """Versions of the packages that this session has already loaded and that cannot be replaced under it."""
  loaded = [name for name in ("jax", "jaxlib", "numpy", "ml_dtypes", "torch", "transformers") if name in sys.modules]
  return {name: importlib.metadata.version(name) for name in loaded}


def install(*packages):
  """pip install; ends here if the session has to be restarted first."""
  before = versions()
  subprocess.run([sys.executable, "-m", "pip", "install", "-q", *packages], check=True)
  importlib.invalidate_caches()
  if stale := [f"{name} {old}" for name, old in before.items() if importlib.metadata.version(name) != old]:
    raise SystemExit(
      f"RESTART NEEDED: newer versions of {', '.join(stale)} are installed, and this session still uses the old ones. "
      "Choose Runtime > Restart session, then Runtime > Run all."
    )


def setting(name, value):
  """A size or path of this notebook: the environment variable NOTEBOOK_NAME, else `value`."""
  given = os.environ.get(f"NOTEBOOK_{name}")
  return value if given is None else type(value)(given)


def program(module, /, **flags):
  """Runs a program of dms_jax, and shows what it says; `data__paths` is --data.paths. Returns its last line, read."""
  listed = lambda value: ",".join(map(str, value)) if isinstance(value, tuple) else value
  words = [f"--{flag.replace('__', '.')}={listed(value)}" for flag, value in flags.items()]
  print("python -m", f"experiments.{module}", *words)
  run = subprocess.Popen([sys.executable, "-u", "-m", f"experiments.{module}", *words], stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT, text=True)  # fmt: skip
  for line in run.stdout:
    print(line if len(line) < 400 else line[:400] + " ...\n", end="")
  if run.wait():
    raise SystemExit(f"experiments.{module} ended with {run.returncode}: see the line above")
  return json.loads(line)


if importlib.util.find_spec("dms_jax") is None:
  extras = ",".join(filter(None, ["demo", DEVICE]))
  if Path("../dms_jax").is_dir():
    install("-e", f"..[{extras}]")
    sys.path.insert(0, str(Path("..").resolve()))  # an editable install is seen by new processes; this one is told
  elif REPOSITORY:
    install(f"dms_jax[{extras}] @ git+{REPOSITORY}")
  else:
    raise SystemExit("set REPOSITORY above to the git address that this notebook comes from, and run again")

import jax

import dms_jax

dms_jax.keep_compiled()  # a second run reads what this one compiles
device = jax.devices()[0]
print(
  f"dms_jax {importlib.metadata.version('dms_jax')}, jax {jax.__version__}, on {len(jax.devices())} x {device.device_kind}"
)
if device.platform == "cpu":
  print("No accelerator is attached: everything runs, on the CPU, with smaller settings and more slowly.")
