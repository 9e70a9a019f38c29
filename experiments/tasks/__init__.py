"""Tasks on which an original and its retrofits are compared, each a file; `TASKS` finds them by name.

Two kinds. Of a `LikelihoodTask` the model scores given continuations of a text (`likelihood.py`); of a `RetrievalTask`
it reads a long text and writes what was hidden in it (`retrieval.py`). `run.py` runs both over every model and keeps
what was paired together; `report.py` prints and draws it.
"""

from __future__ import annotations

from experiments.tasks.base import LikelihoodTask, RetrievalTask
from experiments.tasks.gsm8k import GSM8K
from experiments.tasks.hellaswag import HELLASWAG
from experiments.tasks.mmlu import MMLU
from experiments.tasks.needle import NEEDLE
from experiments.tasks.tracking import TRACKING

TASKS: dict[str, LikelihoodTask | RetrievalTask] = {
  task.name: task for task in (NEEDLE, TRACKING, HELLASWAG, MMLU, GSM8K)
}


def get(name: str) -> LikelihoodTask | RetrievalTask:
  """The task of this name.

  Raises:
    ValueError: there is none.
  """
  if name not in TASKS:
    raise ValueError(f"--tasks: unknown task {name!r}; there are {', '.join(TASKS)}")
  return TASKS[name]
