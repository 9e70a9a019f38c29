"""Runs tasks of lm-evaluation-harness on a model under a policy (extra `lmeval`).

    python -m experiments.lm_eval_model --checkpoint=checkpoints/smollm2-135m-instruct --tasks=hellaswag --limit=100 \\
      --retrofit=smollm2-135m-cr4 --batch=8

Without `--policy` a model with gates runs under DMS, and one without gates keeps every token. `--cr=4` or
`--budget=512` bounds the cache of a policy that has a budget; its other settings are flags (`--h2o.window=16`).
`--include_path` is a folder of YAML tasks. `--output` saves the harness's results with every sample.

The harness's own program finds the model once `experiments.methods.harness` is imported; versions that read entry
points `lm_eval.models` need no import:

    python -c "import experiments.methods.harness; from lm_eval.__main__ import cli_evaluate; cli_evaluate()" \\
      --model dms_jax --model_args checkpoint=DIR,policy=h2o,cr=4,window=16 --tasks hellaswag --batch_size 8
"""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import Any, Literal

from dms_jax import policies
from experiments.common import files, program


@dataclasses.dataclass(frozen=True)
class Config:
  """`limit`: samples a task, or below 1 a share of them. `shots`: examples, instead of the tasks' own number.

  `cr` divides the tokens of a text (prompt and most new ones), `budget` is tokens a head: `Budget`. `chat` applies the
  chat template, with the system message `system` if given. `max_gen_toks`: most new tokens where a task sets none.
  `unsafe` allows tasks that run code written by the model.

  Attributes:
    tasks: names of the harness's tasks, separated by commas.
    policy: none: dms for a model with gates, else vanilla.
    cr: tokens of a text (prompt and most new ones) for each one that a head may hold.
    budget: tokens that a head may hold.
  """

  checkpoint: str
  retrofit: str | None = None
  dtype: Literal["float32", "bfloat16"] | None = None
  policy: str | None = dataclasses.field(default=None, metadata={"choices": policies.REGISTRY})
  cr: float | None = None
  budget: int | None = None
  budget_rule: Literal["paper", "seen"] = "paper"
  tasks: tuple[str, ...] = ()
  include_path: str | None = None
  limit: float | None = None
  shots: int | None = None
  chat: bool = False
  system: str | None = None
  batch: int = 1
  max_length: int | None = None
  max_gen_toks: int = 256
  prefill_chunk: int = 256
  seed: int = 0
  output: Path | None = None
  unsafe: bool = False

  def __post_init__(self):
    if not self.tasks:
      raise ValueError("--tasks=NAME,... is needed: tasks of lm-evaluation-harness, or of --include_path")
    if self.limit is not None and not (0 < self.limit < math.inf and (self.limit < 1 or self.limit == int(self.limit))):
      raise ValueError(f"--limit={self.limit} must be a whole number of samples, or a share between 0 and 1")
    if self.include_path is not None and not Path(self.include_path).is_dir():
      raise ValueError(f"--include_path={self.include_path}: no such folder; it should hold YAML tasks")
    for name, least in (("shots", 0), ("batch", 1), ("max_gen_toks", 1), ("prefill_chunk", 1)):
      if (value := getattr(self, name)) is not None and value < least:
        raise ValueError(f"--{name}={value} must be {least} or more")


def evaluate(config: Config, policy: policies.Policy | None) -> dict[str, Any]:
  """The harness's results, with its samples.

  Args:
    policy: with its settings; None: the model's default.

  Raises:
    ValueError: the harness is not installed, it has no such task, or the policy does not fit the model.
  """
  try:
    import lm_eval
    from lm_eval.tasks import TaskManager
  except ImportError as error:
    raise ValueError(f"lm-evaluation-harness cannot be imported ({error}): pip install 'dms_jax[lmeval]'") from None
  from experiments.methods.harness import DmsJaxLM

  manager = TaskManager(include_path=config.include_path)
  if unknown := [name for name in config.tasks if not manager.match_tasks([name])]:
    raise ValueError(f"--tasks={unknown[0]}: neither lm-evaluation-harness nor --include_path has such a task")
  model = DmsJaxLM(
    config.checkpoint, config.retrofit, config.dtype, policy, config.cr, config.budget, config.budget_rule,
    batch_size=config.batch, max_length=config.max_length, max_gen_toks=config.max_gen_toks,
    prefill_chunk=config.prefill_chunk, seed=config.seed,
  )  # fmt: skip
  limit = config.limit if config.limit is None or config.limit < 1 else int(config.limit)
  found = lm_eval.simple_evaluate(
    model, tasks=list(config.tasks), num_fewshot=config.shots, limit=limit, task_manager=manager,
    system_instruction=config.system, apply_chat_template=config.chat, confirm_run_unsafe_code=config.unsafe,
  )  # fmt: skip
  return {**found, "lm_eval": lm_eval.__version__, "policy": type(model.policy).__name__}


def main() -> None:
  config = program.read_flags("", Config)
  files.check_checkpoint("checkpoint", config.checkpoint)
  files.check_retrofit("retrofit", config.retrofit, whole=True)
  name = config.policy
  policy = None if name is None else program.read_flags(name.lower(), policies.get(name))
  start = time.monotonic()
  found = evaluate(config, policy)
  if config.output is not None:
    program.save_json(config.output, found)
  kept = ("results", "groups", "n-shot", "n-samples", "versions", "higher_is_better", "lm_eval", "policy")
  result = {key: found[key] for key in kept if key in found}
  program.finish({**result, "seconds": math.ceil(time.monotonic() - start)})


if __name__ == "__main__":
  program.define_flags("", Config)
  for policy_name, policy_class in policies.REGISTRY.items():
    program.define_flags(policy_name, policy_class)
  program.run(main, writes="file")
