"""Writes the file trees of README.md and WORKSPACE.md: every tracked file with the first sentence it says of itself.

    python .ci/tree.py            # rewrites what stands between <!-- tree --> and <!-- /tree -->
    python .ci/tree.py --check    # says what is out of date, exit code 1

README.md shows the packages and the top; WORKSPACE.md shows everything. Files without a docstring are described here.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
DESCRIBED = {
  ".ci/run": "what a change must pass",
  ".gitignore": "what git leaves alone",
  "LICENSE": "Apache-2.0",
  "Makefile": "make demo, test, test-parity, test-tpu, lint",
  "README.md": "what this is and how to use it",
  "WORKSPACE.md": "the map for whoever works here",
  "pyproject.toml": "build system and ruff",
  "setup.cfg": "package, dependencies, pytest",
  "colab/01_quickstart.ipynb": "install, convert, generate dense and compressed, see the memory",
  "experiments/LOG.md": "dated results, disappointing ones too",
}
FOLDERS = {  # one line for all that is in them
  "experiments/configs": "sweeps for experiments.ablate; each opens with its command, cost and expected result",
  "experiments/results": "what README quotes: figures, pictures and retrofits, each with its command",
  "tests/goldens": "reference outputs of NVIDIA's PyTorch DMS, both gates",
}
NOT_IN_README = (".ci", ".gitignore", "tests")


def first_sentence(path: Path, most: int = 96) -> str:
  """The first sentence of a module's docstring, cut at a comma or the like where it is long."""
  text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
  sentence = re.split(r"\.(?:\s|$)|\n", text, maxsplit=1)[0].strip()
  if len(sentence) > most:
    ends = [m.start() for m in re.finditer(r"[,:;] ", sentence[:most])] or [sentence[:most].rfind(" ")]
    sentence = sentence[: ends[-1]]
  return sentence


def entries() -> dict[str, str]:
  """Path -> description of every tracked file; a folder of FOLDERS stands for what it holds."""
  listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
  found = {}
  for name in filter(None, listed):
    if folder := next((f for f in FOLDERS if name.startswith(f + "/")), None):
      found[folder + "/"] = FOLDERS[folder]
    elif not (ROOT / name).exists():
      continue
    elif name in DESCRIBED:
      found[name] = DESCRIBED[name]
    elif name.endswith(".py"):
      if words := first_sentence(ROOT / name):  # an empty __init__.py says nothing
        found[name] = words
    elif not name.endswith(".json"):
      raise SystemExit(f"{name}: describe it in .ci/tree.py")
  return found


def drawn(found: dict[str, str]) -> str:
  """The tree as text: folders, then their files, indented."""
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


def rewritten(document: Path, found: dict[str, str]) -> str:
  """`document` with its tree renewed."""
  text = document.read_text(encoding="utf-8")
  block = f"<!-- tree -->\n```\n{drawn(found)}\n```\n<!-- /tree -->"
  new, count = re.subn(r"<!-- tree -->.*?<!-- /tree -->", lambda _: block, text, flags=re.DOTALL)
  if count != 1:
    raise SystemExit(f"{document}: needs one <!-- tree --> ... <!-- /tree -->")
  return new


def main() -> int:
  found, stale = entries(), []
  short = {path: words for path, words in found.items() if not path.startswith(NOT_IN_README)}
  for name, chosen in (("README.md", short), ("WORKSPACE.md", found)):
    new = rewritten(ROOT / name, chosen)
    if new != (ROOT / name).read_text(encoding="utf-8"):
      stale.append(name)
      if "--check" not in sys.argv:
        (ROOT / name).write_text(new, encoding="utf-8")
  if stale and "--check" in sys.argv:
    print(f"file trees out of date in {', '.join(stale)}: run `make tree`", file=sys.stderr)
    return 1
  return 0


if __name__ == "__main__":
  sys.exit(main())
