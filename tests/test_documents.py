"""Documents are true: the file tree, and the programs, targets and paths that they name exist."""

from __future__ import annotations

import ast
import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dms_jax
from dms_jax import families
from dms_jax.families import base
from tests.helpers import save_checkpoints

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "HOW_IT_WORKS.md", "WORKSPACE.md", "colab/README.md", "experiments/results/README.md")
LINKING = sorted(
  str(p.relative_to(ROOT))
  for p in [*ROOT.glob("*.md"), *(ROOT / "colab").glob("*.md"), *(ROOT / "experiments").rglob("*.md")]
)
PACKAGES = ("dms_jax", "pallas_kernels", "experiments", "tests", "colab")


def run_tree(script: Path, *flags: str) -> subprocess.CompletedProcess:
  return subprocess.run([sys.executable, str(script), *flags], cwd=ROOT, capture_output=True, text=True)


def test_file_tree_is_up_to_date():
  if not (ROOT / ".git").exists():
    pytest.skip("not a git checkout: which files belong to it is unknown")
  done = run_tree(ROOT / ".ci" / "tree.py", "--check")
  assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
  ("docstring", "complaint"),
  [
    ("Cuts nothing.", None),
    ("x" * 97 + ".", "module.py: its first sentence has 97 characters"),
    ("Goes on\nbelow.", "module.py: its first sentence is broken over lines"),
  ],
  ids=("fits", "too long", "broken"),
)
def test_a_sentence_that_does_not_fit_is_refused(tmp_path, docstring, complaint):
  """Named with its length, exit code 1, and the document left as it was."""
  (tmp_path / ".ci").mkdir()
  script = tmp_path / ".ci" / "tree.py"
  script.write_text((ROOT / ".ci" / "tree.py").read_text())
  (tmp_path / "module.py").write_text(f'"""{docstring}"""\n')
  document = tmp_path / "WORKSPACE.md"
  document.write_text("<!-- tree -->\n<!-- /tree -->\n")
  for command in (["init", "-q"], ["add", "module.py"]):
    subprocess.run(["git", *command], cwd=tmp_path, check=True)
  done = run_tree(script)
  if complaint is None:
    assert done.returncode == 0 and "module.py  Cuts nothing\n" in document.read_text()
  else:
    assert done.returncode == 1 and complaint in done.stderr
    assert document.read_text() == "<!-- tree -->\n<!-- /tree -->\n"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_named_programs_targets_and_files_exist(name):
  text = (ROOT / name).read_text()
  for program in set(re.findall(r"experiments\.([a-z_]+)", text)):
    module = ROOT / "experiments" / program  # a program, or a room with modules
    assert module.with_suffix(".py").exists() or module.is_dir(), f"{name} names experiments.{program}"
  makefile = (ROOT / "Makefile").read_text()
  for target in set(re.findall(r"`make ([a-z-]+)`", text)):
    assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{name} names make {target}"
  for path in set(re.findall(rf"`((?:{'|'.join(PACKAGES)})/[\w./-]+\w)`", text)):
    assert "NAME" in path or (ROOT / path).exists(), f"{name} names {path}"


@pytest.mark.parametrize("name", LINKING)
def test_linked_files_exist(name):
  text = (ROOT / name).read_text()
  for link in re.findall(r"\]\((?!https?:|#)([^)]+)\)", text):
    assert ((ROOT / name).parent / link.partition("#")[0]).exists(), f"{name} links {link}"


def test_every_program_is_in_the_map():
  text = (ROOT / "WORKSPACE.md").read_text()
  for path in (ROOT / "experiments").glob("*.py"):
    if "\nif __name__ == " in path.read_text():
      assert f"| `{path.stem}` |" in text, f"WORKSPACE's table of programs lacks {path.stem}"


@pytest.mark.parametrize("name", ("README.md", "WORKSPACE.md"))
def test_named_parts_of_the_package_exist(name):
  text = (ROOT / name).read_text()
  for dotted in set(re.findall(r"\bdms_jax\.([A-Za-z_]+)(?![A-Za-z_]*\.(?:git|py)\b)", text)):
    module = ROOT / "dms_jax" / dotted  # a name of the package, or a module or room in it
    assert hasattr(dms_jax, dotted) or module.with_suffix(".py").exists() or module.is_dir(), (
      f"{name}: dms_jax.{dotted}"
    )
  if listed := re.search(r"Other policies: (.*?)\.\s", text, re.DOTALL):
    for policy in re.findall(r"`(\w+)`", listed[1]):
      assert issubclass(getattr(dms_jax, policy), dms_jax.Policy), f"{name} lists the policy {policy}"


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # the readme leaves a file open, for brevity
def test_python_of_the_readme_runs(tmp_path, monkeypatch, capsys):
  """Every block, in order and in one namespace, with a tiny model in place of the one that it names."""
  whole, retrofit = save_checkpoints(tmp_path)
  (tmp_path / "checkpoints").mkdir()
  whole.rename(tmp_path / "checkpoints" / "smollm2-135m-instruct")
  retrofit.rename(tmp_path / "smollm2-135m-cr4")  # a folder of this name comes before the shipped retrofit
  (tmp_path / "LICENSE").write_text("Licensed under a short licence. " * 4)
  monkeypatch.chdir(tmp_path)
  blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
  namespace: dict = {}
  for block in blocks:
    exec(compile(block, "README.md", "exec"), namespace)
  assert blocks and "Vanilla: " in (printed := capsys.readouterr().out) and "DMS: " in printed


def test_the_family_that_the_map_shows_is_the_one_in_the_code():
  """WORKSPACE's example of a family, but for its presets."""
  (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "WORKSPACE.md").read_text(), re.DOTALL)
  found: dict = {"Family": base.Family, "GGUF": base.GGUF, "register": lambda family: family}
  exec(compile(block, "WORKSPACE.md", "exec"), found)
  shown, own = found["OLMO2"], families.get("olmo2")
  assert [f.name for f in dataclasses.fields(own) if getattr(own, f.name) != getattr(shown, f.name)] == ["presets"]


def test_variants_exist():
  """Every line of tests/variants.txt names a file and a test in it."""
  for line in (ROOT / "tests" / "variants.txt").read_text().splitlines():
    if line and not line.startswith("#"):
      file, test = line.split("[")[0].split("::")
      test = re.compile(rf"^def {test.replace('*', '.*')}\(", re.MULTILINE)
      assert any(test.search(path.read_text()) for path in (ROOT / "tests").rglob(file)), line


def test_every_target_has_help():
  """`make help` prints the targets whose line has a `##`."""
  makefile = (ROOT / "Makefile").read_text()
  targets = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE).group(1).split()
  for target in targets:
    assert re.search(rf"^{target}:.*## \w", makefile, re.MULTILINE), f"make help lacks {target}"


@pytest.mark.parametrize(
  ("package", "others"),
  [
    ("pallas_kernels", ("dms_jax", "experiments", "tests")),
    ("dms_jax", ("experiments", "tests", "matplotlib", "tqdm", "torch")),
  ],
)
def test_packages_import_only_what_lies_below_them(package, others):
  for path in (ROOT / package).rglob("*.py"):
    if path.name == "modeling_dms.py":  # data: exports copy it, for transformers to run
      continue
    found = re.findall(r"^\s*(?:from|import) (\w+)", path.read_text(), re.MULTILINE)
    assert not set(found) & set(others), f"{path.relative_to(ROOT)} imports {set(found) & set(others)}"
    assert not re.search(r"import.*modeling_dms", path.read_text())


def public_without_docstring(path: Path) -> list[str]:
  """Public functions and classes of a module that have none."""
  missing = []
  for node in ast.parse(path.read_text(encoding="utf-8")).body:
    if (
      isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_") and not ast.get_docstring(node)
    ):
      missing.append(f"{path.relative_to(ROOT)}: {node.name}")
  return missing


@pytest.mark.parametrize("package", ("dms_jax", "pallas_kernels"))
def test_public_names_have_docstrings(package):
  modules = (path for path in sorted((ROOT / package).rglob("*.py")) if path.name != "modeling_dms.py")
  missing = [name for path in modules for name in public_without_docstring(path)]
  assert not missing, "\n".join(missing)
