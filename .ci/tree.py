"""Writes the file tree of WORKSPACE.md: each tracked file and its docstring's first sentence.

    python .ci/tree.py            # rewrites the text between <!-- tree --> and <!-- /tree -->
    python .ci/tree.py --check    # changes nothing; exit code 1 if the tree is out of date

A sentence has to fit a line: one longer than LONGEST characters, or broken over two lines, is refused with exit code 1.
Files without a docstring are described in DESCRIBED, folders that take one line in FOLDERS.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCUMENT = ROOT / "WORKSPACE.md"
LONGEST = 96
DESCRIBED = {
  ".ci/run": "everything a change must pass",
  ".gitignore": "files that git ignores",
  ".pre-commit-config.yaml": "checks before a commit: ruff, mypy, the file tree",
  "CHANGELOG.md": "what a user has to change, version by version",
  "HOW_IT_WORKS.md": "the method with pictures: rule, gates, training, cache",
  "LICENSE": "Apache-2.0",
  "Makefile": "make help lists the targets",
  "README.md": "first result, main table, paper to code, limits",
  "WORKSPACE.md": "the map for contributors",
  "pyproject.toml": "build system, ruff, mypy",
  "setup.cfg": "package, dependencies, pytest",
  "tests/variants.txt": "tests that make test leaves to make test-variants",
  "experiments/LOG.md": "dated results, disappointing ones too",
  "experiments/reports/templates/report.html": "the page of experiments.report, in Jinja",
  "experiments/reports/templates/hyperscale.html": "the page of experiments.hyperscale; it extends report.html",
}
FOLDERS = {
  "colab": "six notebooks: NAME.py is the text, NAME.ipynb made from it (make notebooks), install.py their first cell",
  "experiments/configs": "sweeps for experiments.ablate; each opens with its command, cost and expected result",
  "experiments/results": "measured figures, pictures and retrofits, each with its command; README.md has the tables",
  "tests/goldens": "reference outputs of NVIDIA's PyTorch DMS, and files of every schema",
}


def first_sentence(path: Path) -> str:
  """The first sentence of a module's docstring, whole; empty without a docstring.

  Raises:
    ValueError: it does not end within its line, or is longer than LONGEST characters.
  """
  paragraph = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n\n")[0]
  sentence = re.split(r"(?<!et al)(?<!e\.g)(?<!i\.e)[.](?:\s|$)", paragraph, maxsplit=1)[0].strip()
  name, length = path.relative_to(ROOT), len(sentence)
  if "\n" in sentence:
    raise ValueError(
      f"{name}: its first sentence is broken over lines; make it one line of at most {LONGEST} characters"
    )
  if length > LONGEST:
    raise ValueError(f"{name}: its first sentence has {length} characters; the tree takes {LONGEST}")
  return sentence


def entries() -> dict[str, str]:
  """Path to description of every tracked file; FOLDERS take one entry each.

  Raises:
    ValueError: sentences that do not fit and files that nothing describes, all of them, a line each.
  """
  done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
  found, errors = {}, []
  for name in filter(None, done.stdout.split("\n")):
    if folder := next((f for f in FOLDERS if name.startswith(f + "/")), None):
      found[folder + "/"] = FOLDERS[folder]
    elif not (ROOT / name).exists():
      continue
    elif name in DESCRIBED:
      found[name] = DESCRIBED[name]
    elif name.endswith(".py"):
      try:
        sentence = first_sentence(ROOT / name)
      except ValueError as error:
        errors.append(str(error))
      else:
        if sentence:  # an empty __init__.py has none
          found[name] = sentence
    elif not name.endswith(".json"):
      errors.append(f"{name}: describe it in .ci/tree.py")
  if errors:
    raise ValueError("\n".join(errors))
  return found


def as_text(found: dict[str, str]) -> str:
  """The tree: top-level files first, then each folder, indented, with its files before its folders."""
  key = lambda path: tuple((i < len(path.split("/")) - 1, part) for i, part in enumerate(path.split("/")))
  lines, open_folders = [], ()
  for path in sorted(found, key=key):
    *folders, name = path.rstrip("/").split("/")
    name += "/" * path.endswith("/")
    shared = 0
    while shared < min(len(folders), len(open_folders)) and folders[shared] == open_folders[shared]:
      shared += 1
    lines += [("  " * depth + folders[depth] + "/", "") for depth in range(shared, len(folders))]
    open_folders = tuple(folders)
    lines.append(("  " * len(folders) + name, found[path]))
  width = max(len(left) for left, _ in lines) + 2
  return "\n".join(f"{left:<{width}}{right}".rstrip() for left, right in lines)


def main() -> int:
  try:
    tree = as_text(entries())
  except ValueError as error:
    print(error, file=sys.stderr)
    return 1
  old = DOCUMENT.read_text(encoding="utf-8")
  block = f"<!-- tree -->\n```\n{tree}\n```\n<!-- /tree -->"
  new, count = re.subn(r"<!-- tree -->.*?<!-- /tree -->", lambda _: block, old, flags=re.DOTALL)
  if count != 1:
    print(f"{DOCUMENT.name}: needs one <!-- tree --> ... <!-- /tree -->", file=sys.stderr)
    return 1
  if new == old:
    return 0
  if "--check" in sys.argv:
    print(f"the file tree of {DOCUMENT.name} is out of date: run `make tree`", file=sys.stderr)
    return 1
  DOCUMENT.write_text(new, encoding="utf-8")
  return 0


if __name__ == "__main__":
  sys.exit(main())
