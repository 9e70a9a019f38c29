"""A wheel, away from the checkout, exports a folder with which transformers evicts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from dms_jax import checkpoint
from dms_jax import testing as tiny
from dms_jax.config import LoRAConfig
from tests.helpers import ROOT

PACKAGES = ("dms_jax", "pallas_kernels", "experiments")
EVICT = """
import sys, torch, transformers, dms_jax
assert dms_jax.__file__.startswith(sys.argv[1]), dms_jax.__file__
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[2], trust_remote_code=True)
out = model.generate(
  torch.arange(1, 21)[None], max_new_tokens=20, do_sample=False, eos_token_id=None, return_dict_in_generate=True
)
print(out.sequences.shape[1], out.cache.live().sum().item(), out.cache.live().numel() * out.cache.columns)
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
  """A folder with the content of a wheel of this checkout, as pip would unpack it."""
  root = tmp_path_factory.mktemp("wheel")
  ignored = shutil.ignore_patterns("__pycache__", "results")
  for name in PACKAGES:
    shutil.copytree(ROOT / name, root / "source" / name, ignore=ignored)
  for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
    shutil.copy(ROOT / name, root / "source" / name)
  command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", root, root / "source"]
  done = subprocess.run(command, capture_output=True, text=True)
  if "No matching distribution" in done.stderr or "Could not find a version" in done.stderr:
    pytest.skip("setuptools, which builds the wheel, cannot be had here")
  assert done.returncode == 0, done.stderr
  (wheel,) = root.glob("*.whl")
  zipfile.ZipFile(wheel).extractall(root / "site")
  return root / "site"


def test_every_file_of_the_packages(site):
  files = lambda root: {str(f.relative_to(root)) for name in PACKAGES for f in (root / name).rglob("*") if f.is_file()}
  assert files(site.parent / "source") - files(site) == {"experiments/LOG.md"}  # notes, which no program reads


def test_an_export_evicts(site, torch, transformers, tmp_path):
  """Both programs run where there is no checkout, with the wheel's files alone."""
  model = tiny.model(tiny.config(), tiny.dms(), LoRAConfig(rank=2))
  checkpoint.save(tmp_path / "base", model, groups=("base",))
  checkpoint.save(tmp_path / "retrofit", model, groups=("gate", "lora"))
  (tmp_path / "here").mkdir()
  places = {"PYTHONPATH": str(site), "HF_MODULES_CACHE": str(tmp_path / "modules")}

  def run(*command) -> str:
    done = subprocess.run(
      [sys.executable, *command], cwd=tmp_path / "here", env={**os.environ, **places}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]

  folders = {"checkpoint": "../base", "retrofit": "../retrofit", "output": "out"}
  run("-m", "experiments.export_torch", "--layout=dms_torch", *(f"--{k}={v}" for k, v in folders.items()))
  length, held, read = map(int, run("-c", EVICT, str(site), "out").split())
  assert length == 40 and held < 0.9 * read
