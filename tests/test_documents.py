"""What the documents say of the repository is true: their file trees, the programs they name, the paths they link."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "WORKSPACE.md")


def test_file_trees_are_up_to_date():
  if not (ROOT / ".git").exists():
    pytest.skip("not a git checkout: which files belong to it is unknown")
  done = subprocess.run([sys.executable, ".ci/tree.py", "--check"], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", DOCUMENTS)
def test_named_programs_targets_and_files_exist(name):
  text = (ROOT / name).read_text()
  for program in set(re.findall(r"experiments\.([a-z_]+)", text)):
    assert (ROOT / "experiments" / f"{program}.py").exists(), f"{name} names experiments.{program}"
  makefile = (ROOT / "Makefile").read_text()
  for target in set(re.findall(r"`make ([a-z-]+)`", text)):
    assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{name} names make {target}"
  for path in set(re.findall(r"`((?:dms_jax|pallas_kernels|experiments|tests|colab)/[\w./-]+\w)`", text)):
    assert "NAME" in path or (ROOT / path).exists(), f"{name} names {path}"


def test_every_program_is_in_the_readme():
  text = (ROOT / "README.md").read_text()
  for path in (ROOT / "experiments").glob("*.py"):
    if "\nif __name__ == " in path.read_text():
      assert f"| `{path.stem}` |" in text, f"README's table of programs lacks {path.stem}"


@pytest.mark.parametrize(
  ("package", "others"),
  [
    ("pallas_kernels", ("dms_jax", "experiments", "tests")),
    ("dms_jax", ("experiments", "tests", "matplotlib", "tqdm", "torch")),
  ],
)
def test_packages_import_only_what_lies_below_them(package, others):
  for path in (ROOT / package).rglob("*.py"):
    found = re.findall(r"^\s*(?:from|import) (\w+)", path.read_text(), re.MULTILINE)
    assert not set(found) & set(others), f"{path.relative_to(ROOT)} imports {set(found) & set(others)}"
