"""Writes the notebooks of colab/ from their texts, colab/NAME.py in percent format.

    python .ci/notebooks.py            # rewrites every notebook
    python .ci/notebooks.py --check    # changes nothing; exit code 1 if a notebook is out of date

A line `# %%` begins a cell of code, `# %% [markdown]` one of text, whose lines begin with `# `. The cell `# %% install`
is colab/install.py, the same in every notebook. The repository's address stands once, as `url` in setup.cfg: {url} and
{badge} in the texts come from it. Notebooks hold no outputs.
"""

from __future__ import annotations

import configparser
import hashlib
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "colab"
INSTALL = FOLDER / "install.py"
CELL = "# %%"


def url() -> str:
  """The repository's address, without .git; "" where setup.cfg has none."""
  config = configparser.ConfigParser(interpolation=None)
  config.read(ROOT / "setup.cfg", encoding="utf-8")
  return config["metadata"].get("url", "").strip().removesuffix(".git")


def badge(name: str) -> str:
  """The badge that opens a notebook in Colab, in Markdown; without an address it leads to the notebook's file."""
  image = "https://colab.research.google.com/assets/colab-badge.svg"
  base = url().replace("https://github.com/", "https://colab.research.google.com/github/")
  return f"[![Open in Colab]({image})]({f'{base}/blob/main/colab/' if base else ''}{name}.ipynb)"


def cells(text: str) -> list[tuple[str, str]]:
  """(kind, source) of each cell of a text; kind is "code", "markdown" or "install"."""
  found = []
  for part in text.split(f"\n{CELL}")[1:]:
    kind, _, body = part.partition("\n")
    kind = {"": "code", "[markdown]": "markdown", "install": "install"}[kind.strip()]
    lines = body.strip("\n").split("\n")
    if kind == "markdown":
      lines = [line.removeprefix("#").removeprefix(" ") for line in lines]
    found.append((kind, "\n".join(lines)))
  return found


def notebook(path: Path) -> str:
  """The notebook of a text, as JSON."""
  filled = lambda text: text.replace("{url}", url()).replace("{badge}", badge(path.stem))
  made = []
  for kind, source in cells("\n" + path.read_text(encoding="utf-8")):
    if kind == "install":
      kind, source = "code", INSTALL.read_text(encoding="utf-8").strip("\n")
    name = hashlib.sha256(f"{len(made)} {source}".encode()).hexdigest()[:8]
    cell = {"cell_type": kind, "id": name, "metadata": {}, "source": filled(source).splitlines(keepends=True)}
    made.append(cell | ({"execution_count": None, "outputs": []} if kind == "code" else {}))
  about = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
           "language_info": {"name": "python"}, "colab": {"provenance": []}}  # fmt: skip
  return json.dumps({"cells": made, "metadata": about, "nbformat": 4, "nbformat_minor": 5}, indent=1) + "\n"


def main() -> int:
  late = []
  for path in sorted(FOLDER.glob("[0-9]*.py")):
    target, new = path.with_suffix(".ipynb"), notebook(path)
    if not target.exists() or target.read_text(encoding="utf-8") != new:
      late.append(target.name)
      if "--check" not in sys.argv:
        target.write_text(new, encoding="utf-8")
  if late and "--check" in sys.argv:
    print(f"{', '.join(late)}: out of date; run `make notebooks`", file=sys.stderr)
    return 1
  return 0


if __name__ == "__main__":
  sys.exit(main())
