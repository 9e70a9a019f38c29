"""Programs, each run as `python -m experiments.NAME --flag=...`, and packages that they share."""

import sys

if sys.argv[:1] == ["-m"]:  # a program is about to be imported, which takes a second or two
  from experiments.common import early, stopping

  if name := early.program_name():
    early.check(name)
  stopping.install()
