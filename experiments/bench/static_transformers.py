"""Times each step of transformers' `generate` with a static cache and torch.compile.

The model has random weights. `experiments.bench_generate` runs `measure` in a separate process, so that two frameworks
do not share a device's memory.
"""

from __future__ import annotations

import itertools
import statistics
import time


def measure(config: dict, batch: int, tokens: int, new_tokens: int, dtype: str) -> dict:
  """Seconds of a decode step, or why there are none ("skipped").

  Args:
    config: fields of transformers' LlamaConfig.
    tokens: length of each prompt, whose tokens are random.
    new_tokens: tokens generated after it, twice; the first time compiles.

  Returns:
    step_s, the median of the second half of the steps; tokens_per_s; first_token_s; versions.
  """
  try:
    import torch
    import transformers
  except ImportError as error:
    return {"skipped": f"torch and transformers are not installed: {error}"}
  device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
  torch.manual_seed(0)
  torch.set_default_dtype(getattr(torch, dtype))
  with device:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).eval()
  torch.set_default_dtype(torch.float32)
  ids = torch.randint(0, config["vocab_size"], (batch, tokens), device=device)
  moments = []

  class Watch(transformers.StoppingCriteria):
    """Records the time of each token and never stops."""

    def __call__(self, input_ids, scores, **kwargs):
      if device.type == "cuda":
        torch.cuda.synchronize()
      moments.append(time.perf_counter())
      return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

  for _ in range(2):
    moments.clear()
    begin = time.perf_counter()
    with torch.inference_mode():
      model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, min_new_tokens=new_tokens,
        do_sample=False, cache_implementation="static", pad_token_id=0,
        stopping_criteria=transformers.StoppingCriteriaList([Watch()]),
      )  # fmt: skip
  steps = [after - before for before, after in itertools.pairwise(moments)]
  step = statistics.median(steps[len(steps) // 2 :])
  return {
    "step_s": step, "tokens_per_s": batch / step, "first_token_s": moments[0] - begin,
    "torch": torch.__version__, "transformers": transformers.__version__, "on": device.type,
  }  # fmt: skip
